"""Every option that engines on GPUs are started with is one that the real vLLM takes, as its own parser says."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm

RECORDED = Path(__file__).parents[1] / "deploy" / "gpu_commands.txt"
PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
taken = []
for argv in json.load(sys.stdin):
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(argv)
    model = args.model_tag or args.model
    taken.append([model, args.served_model_name, args.tensor_parallel_size, args.shutdown_timeout])
print(json.dumps(taken))
"""


def test_vllm_takes_what_engines_are_started_with(vllm_command):
    lines = [shlex.split(line) for line in RECORDED.read_text().splitlines() if "--served-model-name" in line]
    argvs = []
    for words in lines:
        begin = words.index("serve") + 1 if "serve" in words else words.index("vllm.entrypoints.openai.api_server") + 1
        argvs.append(words[begin:])
    shown = subprocess.run(
        [vllm_command[0], "-c", PARSE], input=json.dumps(argvs), capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr[-2000:]
    taken = json.loads(shown.stdout.splitlines()[-1])
    assert len(taken) == len(lines) > 5
    for words, (model, served, size, shutdown_s) in zip(lines, taken, strict=True):
        assert served == [words[words.index("--served-model-name") + 1]]
        assert model == f"models/{served[0]}"
        assert size == int(words[words.index("--tensor-parallel-size") + 1])
        assert shutdown_s == 10
