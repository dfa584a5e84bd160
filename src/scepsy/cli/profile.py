"""`scepsy profile`: how fast a model runs, as a profile file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from scepsy.cli.options import parse_command
from scepsy.files import save_profile
from scepsy.profiling import EngineChoice, EngineFlags, Limits, estimate, measure, profile_model, traced_lengths
from scepsy.profiling.arrivals import Lengths
from scepsy.traces import read_executions
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.profile import LLMProfile

HELP = "write the profile of a model: measured on engines that are started for it, or on a running one, or estimated"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", metavar="MODEL", help="Hugging Face id or directory")
    parser.add_argument("--device-type", required=True, metavar="TYPE", help="such as H100, or CPU")
    parser.add_argument("--llm", metavar="NAME", help="served model name (default: the last part of MODEL)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--estimate", action="store_true", help="estimate it, without any device (scepsy[estimate])")
    how.add_argument("--endpoint", metavar="URL", help="measure this running engine, which nobody else may use")
    parser.add_argument("--tensor-parallel", default="1", metavar="SIZES", help="such as 1,2,4 (default: 1)")
    parser.add_argument("--fractions", default="1", metavar="PARTS", help="of one device, such as 1,0.5 (default: 1)")
    parser.add_argument(
        "--traces", nargs="+", metavar="PATH", help="also send Poisson loads of this LLM's traced lengths"
    )
    parser.add_argument(
        "--requests",
        type=int,
        default=100,
        metavar="N",
        help="of each Poisson load, of which there are 9 (default: 100)",
    )
    parser.add_argument("--engine", choices=("vllm", "vllm-cpu"), default="vllm", help="default: vllm")
    parser.add_argument("--command", dest="engine_command", metavar="WORDS", help="how to start one engine")
    parser.add_argument("--max-num-seqs", type=int, default=256, metavar="N", help="vLLM's (default: 256)")
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192, metavar="N", help="vLLM's (default: 8192)")
    parser.add_argument("--max-model-len", type=int, default=32768, metavar="N", help="vLLM's (default: 32768)")
    parser.add_argument("-o", "--output", metavar="FILE", help="default: NAME_TYPE.yaml")


def run(args: argparse.Namespace, console: Console) -> int:
    """Profile, write, say where."""
    llm = args.llm or args.model.rstrip("/").rsplit("/", 1)[-1].lower()
    target = Path(args.output or f"{llm}_{args.device_type.lower()}.yaml")
    profile = _profile(args, llm, target, console)
    save_profile(profile, target)
    sizes = ", ".join(str(steps.tensor_parallel_size) for steps in profile.steps)
    console.print(f"{profile.provenance.source}: {llm} on {profile.device_type} at tensor_parallel_size {sizes}")
    console.print(f"written to {target}; plan with it: scepsy optimize TRACES --profiles {target} ...", soft_wrap=True)
    return 0


def _profile(args: argparse.Namespace, llm: str, target: Path, console: Console) -> LLMProfile:
    sizes = [int(size) for size in _numbers("--tensor-parallel", args.tensor_parallel)]
    device_type = args.device_type.upper()
    if args.estimate:
        return estimate(args.model, device_type, llm=llm, tensor_parallel_sizes=tuple(sizes))

    def tell(event: str) -> None:
        console.print(event, soft_wrap=True, markup=False, highlight=False)

    lengths: Sequence[Lengths] = ()
    if args.traces:
        lengths = traced_lengths(read_executions(args.traces).executions, llm)
    # Finished points are kept beside the file, so that a run that was cut off goes on where it was.
    journal = target.with_suffix(".points")
    if args.endpoint:
        return measure(
            args.endpoint,
            llm,
            device_type=device_type,
            model=args.model,
            flags=EngineFlags(
                tensor_parallel_size=sizes[0],
                max_num_seqs=args.max_num_seqs,
                max_num_batched_tokens=args.max_num_batched_tokens,
            ),
            lengths=lengths,
            requests_per_load=args.requests,
            journal=journal,
            on_point=tell,
        )
    command = parse_command(args.engine_command)
    return profile_model(
        args.model,
        llm=llm,
        device_type=device_type,
        tensor_parallel_sizes=sizes,
        fractions=_numbers("--fractions", args.fractions),
        lengths=lengths,
        requests_per_load=args.requests,
        limits=Limits(
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            max_model_len=args.max_model_len,
        ),
        choice=EngineChoice(engine=args.engine, command=None if command is None else tuple(command)),
        folder=journal,
        on_event=tell,
    )


def _numbers(option: str, text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ScepsyError(f"{option} {text!r}: write numbers with commas between them, such as 1,2") from error
    if not all(number > 0 for number in found):
        raise ScepsyError(f"{option} {text!r}: each must be above 0")
    return found
