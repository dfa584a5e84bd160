"""Stands where vLLM would: takes its arguments, forks children as it does, answers, or misbehaves.

How it misbehaves is read from the file named by STUB_BEHAVIOUR when it starts; what it was given is left in STUB_SEEN.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SLEEPER = "import time; time.sleep(600)"


def main():
    behaviour = Path(os.environ["STUB_BEHAVIOUR"]).read_text() if "STUB_BEHAVIOUR" in os.environ else ""
    parser = argparse.ArgumentParser()
    parser.add_argument("--served-model-name")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    args, _ = parser.parse_known_args()
    if "STUB_SEEN" in os.environ:
        seen = {"argv": sys.argv[1:], "env": dict(os.environ), "cores": sorted(os.sched_getaffinity(0))}
        (Path(os.environ["STUB_SEEN"]) / f"{args.port}.json").write_text(json.dumps(seen))
    print("loading the model", flush=True)
    if "stubborn" in behaviour:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "children" in behaviour:
        # One in the engine's session as vLLM's are, one that has left it.
        subprocess.Popen([sys.executable, "-c", SLEEPER])
        subprocess.Popen([sys.executable, "-c", SLEEPER], start_new_session=True)
    if "core" in behaviour:
        # As vLLM's API server, which ends in peace a while after its engine process was lost.
        core = subprocess.Popen([sys.executable, "-c", SLEEPER])
        threading.Thread(target=lambda: os._exit(core.wait() and 0), daemon=True).start()
    if "dies" in behaviour:
        print("ValueError: No available memory for the cache blocks.", flush=True)
        print("\n".join(f"noise {number}" for number in range(30)), flush=True)
        return 3
    if "hangs" in behaviour:
        time.sleep(600)
    name = "another" if "misnamed" in behaviour else args.served_model_name

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.answer({"data": [{"id": name}]} if self.path == "/v1/models" else {})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            time.sleep(asked.get("hold_s", 0))
            if not asked.get("pieces"):
                self.answer({"pid": os.getpid()})
                return
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for number in range(asked["pieces"]):
                piece = f"data: {number}\n\n".encode()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                time.sleep(asked["every_s"])
            self.wfile.write(b"0\r\n\r\n")

        def answer(self, content):
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            """A client that has gone is no news; the log is for what the engine says."""

    Server((args.host, args.port), Handler).serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
