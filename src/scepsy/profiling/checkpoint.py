"""Where a model's configuration is: a directory, aiconfigurator's bundle, the Hugging Face cache, or its hub."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scepsy_optimizer.errors import ScepsyError

_CONFIG_FILES = ("config.json", "hf_quant_config.json")
_DOWNLOAD_TIMEOUT_S = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model's config.json, with the quantisation that some keep in a second file merged in.

    `weights_bytes` is the size of its safetensors where they are on this machine, else None.
    """

    model: str
    config: Mapping[str, Any]
    weights_bytes: int | None = None


def find_checkpoint(model: str) -> Checkpoint:
    """Find the configuration of a directory or Hugging Face id.

    An id is looked for in aiconfigurator's bundle, then in the local Hugging Face cache, then on the hub (not with
    HF_HUB_OFFLINE set). Raises ScepsyError, naming ids of known shape that look alike.
    """
    directory = Path(model).expanduser()
    if directory.is_dir():
        return _read_directory(model, directory)
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ScepsyError(f"model {model!r}: no such directory; name a directory with a config.json")
    bundle = bundled_models()
    if model in bundle:
        return Checkpoint(model=model, config=_merged(bundle[model].parent, bundle[model].name.removesuffix(_SUFFIX)))
    snapshot = _cached_snapshot(model)
    if snapshot is not None:
        return _read_directory(model, snapshot)
    return _download(model, bundle)


_SUFFIX = "config.json"


def bundled_models() -> dict[str, Path]:
    """The Hugging Face ids whose configuration comes with aiconfigurator-core, and where; empty without it."""
    found = find_spec("aiconfigurator_core")
    if found is None or not found.submodule_search_locations:
        return {}
    folder = Path(found.submodule_search_locations[0]) / "model_configs"
    files = [path for path in folder.glob("*_config.json") if not path.name.endswith("_hf_quant_config.json")]
    return {path.name.removesuffix("_config.json").replace("--", "/", 1): path for path in sorted(files)}


def _read_directory(model: str, directory: Path) -> Checkpoint:
    if not (directory / "config.json").is_file():
        raise ScepsyError(f"model {model!r}: {directory} has no config.json")
    weights = [path.stat().st_size for path in directory.glob("*.safetensors")]
    return Checkpoint(model=model, config=_merged(directory, ""), weights_bytes=sum(weights) or None)


def _merged(folder: Path, prefix: str) -> dict[str, Any]:
    """config.json with the quantization of hf_quant_config.json, ModelOpt's own file, under its usual key."""
    config = _read_json(folder / f"{prefix}config.json")
    quantization = folder / f"{prefix}hf_quant_config.json"
    if quantization.is_file() and not config.get("quantization_config"):
        config["quantization_config"] = {"quant_method": "modelopt", **_read_json(quantization).get("quantization", {})}
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ScepsyError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ScepsyError(f"{path}: expected a JSON object")
    return content


def _cached_snapshot(model: str) -> Path | None:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    snapshots = (hub / f"models--{model.replace('/', '--')}" / "snapshots").glob("*/config.json")
    newest = max(snapshots, key=lambda path: path.stat().st_mtime, default=None)
    return None if newest is None else newest.parent


def _download(model: str, bundle: Mapping[str, Path]) -> Checkpoint:
    close = get_close_matches(model, bundle, n=4, cutoff=0.5)
    advice = f"Name a directory with its config.json{', or one of these: ' + ', '.join(close) if close else ''}"
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in {"1", "true", "yes", "on"}:
        raise ScepsyError(f"model {model!r} is not on this machine, and HF_HUB_OFFLINE is set. {advice}")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    token = os.environ.get("HF_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    found: dict[str, dict[str, Any]] = {}
    for name in _CONFIG_FILES:
        url = f"{endpoint}/{model}/resolve/main/{name}"
        request = urllib.request.Request(url, headers=headers)  # noqa: S310 - the hub's address, or the user's own
        try:
            with urllib.request.urlopen(request, timeout=_DOWNLOAD_TIMEOUT_S) as response:  # noqa: S310 - the same
                found[name] = json.load(response)
        except urllib.error.HTTPError as error:
            if name == "config.json":
                hint = "; it may be gated: set HF_TOKEN" if error.code in (401, 403) else ""
                raise ScepsyError(f"model {model!r}: {endpoint} answered {error.code}{hint}. {advice}") from error
        except (OSError, ValueError) as error:
            raise ScepsyError(
                f"model {model!r} is not on this machine and could not be fetched: {error}. {advice}"
            ) from error
    config = found["config.json"]
    if "hf_quant_config.json" in found and not config.get("quantization_config"):
        quantization = found["hf_quant_config.json"].get("quantization", {})
        config["quantization_config"] = {"quant_method": "modelopt", **quantization}
    return Checkpoint(model=model, config=config)
