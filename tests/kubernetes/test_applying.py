"""Against a small server that speaks what of Kubernetes' API is used: stands for a cluster, which cannot run here."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from scepsy.deployment.on_kubernetes.applying import apply_manifests, connected, remove, wait_until_ready
from scepsy.deployment.on_kubernetes.manifests import render
from scepsy_optimizer.errors import ScepsyError

KINDS = {
    "deployments": "Deployment",
    "services": "Service",
    "configmaps": "ConfigMap",
    "resourceclaims": "ResourceClaim",
}
PATH = re.compile(r"^/(?:api/v1|apis/[\w.]+/v1)/namespaces/([\w-]+)/(\w+)(?:/([\w-]+))?$")


class Server:
    """Objects by namespace, kind and name. Deployments get ready by themselves unless they are in `stuck`."""

    def __init__(self):
        self.objects, self.stuck, self.refuse, self.seen = {}, set(), None, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.handle_one("GET")

            def do_PATCH(self):
                self.handle_one("PATCH")

            def do_DELETE(self):
                self.handle_one("DELETE")

            def handle_one(self, method):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, answer = outer.answer(method, self.path, self.headers, body)
                text = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, method, path, headers, body):
        parts = urlsplit(path)
        query = parse_qs(parts.query)
        namespace, plural, name = PATH.match(parts.path).groups()
        self.seen.append((method, plural, name))
        if plural == self.refuse:
            return 403, {"kind": "Status", "message": f"{plural} is forbidden"}
        if plural not in KINDS:
            return 404, {"kind": "Status", "message": "the server could not find the requested resource"}
        if method == "PATCH":
            assert headers["Content-Type"] == "application/apply-patch+yaml"
            assert query["fieldManager"] == ["scepsy"]
            one = json.loads(body)
            assert (one["kind"], one["metadata"]["name"]) == (KINDS[plural], name)
            if plural == "deployments":
                lacks = {"type": "Available", "status": "False", "message": "0/3 nodes have nvidia.com/gpu free"}
                is_stuck = name in self.stuck
                one["status"] = {"conditions": [lacks]} if is_stuck else {"readyReplicas": 1, "observedGeneration": 1}
            self.objects[namespace, plural, name] = one
            return 200, one
        if method == "DELETE":
            found = self.objects.pop((namespace, plural, name), None)
            return (200, {}) if found else (404, {"message": "not found"})
        key, value = query["labelSelector"][0].split("=")
        items = [
            one
            for (space, kind, _), one in self.objects.items()
            if (space, kind) == (namespace, plural) and one["metadata"]["labels"].get(key) == value
        ]
        return 200, {"items": items}


@pytest.fixture
def server():
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def api(server, tmp_path, monkeypatch):
    address = f"http://127.0.0.1:{server.http.server_port}"
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": address}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    # The client reads it when it is imported for the first time.
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    with connected() as client:
        yield client


WHERE = {"namespace": "serving", "name": "agents"}


def test_apply_change_and_remove(server, api, make_plan, options):
    events = []
    manifests = render(make_plan(), options(namespace="serving", sharing="dra"))
    apply_manifests(api, manifests, **WHERE, on_event=events.append)
    assert len(server.objects) == len(manifests) == len(events)
    wait_until_ready(api, **WHERE, timeout_s=5, on_event=events.append)
    assert events[-1].endswith("is ready")
    # Somebody else's object is nobody's business here.
    server.objects["serving", "services", "other"] = {"metadata": {"name": "other", "labels": {}}}
    fewer = make_plan(make_plan.part("writer", ("gpu-a", (2,))))
    apply_manifests(api, render(fewer, options(namespace="serving")), **WHERE, on_event=events.append)
    left = {name for _, kind, name in server.objects if kind == "deployments"}
    assert left == {"agents", "agents-writer-0"}
    assert not any(kind == "resourceclaims" for _, kind, _ in server.objects)
    remove(api, **WHERE, on_event=events.append)
    assert set(server.objects) == {("serving", "services", "other")}
    with pytest.raises(ScepsyError, match="has nothing of a deployment 'agents'"):
        remove(api, **WHERE, on_event=events.append)


def test_a_pod_that_never_comes_is_told_with_its_reason(server, api, make_plan, options):
    server.stuck.add("agents-writer-1")
    manifests = render(make_plan(), options(namespace="serving", sharing="hami"))
    apply_manifests(api, manifests, **WHERE, on_event=lambda _: None)
    with pytest.raises(ScepsyError, match=r"agents-writer-1: 0/3 nodes have nvidia.com/gpu free. Ask: kubectl"):
        wait_until_ready(api, **WHERE, timeout_s=0, on_event=lambda _: None)


def test_what_the_server_refuses_is_told_in_its_words(server, api, make_plan, options):
    server.refuse = "deployments"
    with pytest.raises(ScepsyError, match=r"refused to patch Deployment 'agents-[\w-]+': deployments is forbidden"):
        apply_manifests(
            api, render(make_plan(), options(namespace="serving", sharing="hami")), **WHERE, on_event=lambda _: None
        )


def test_without_a_cluster(tmp_path, monkeypatch):
    missing = str(tmp_path / "none")
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", missing)
    with pytest.raises(ScepsyError, match="no Kubernetes cluster is set up"), connected():
        pass
