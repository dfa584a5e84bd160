"""`scepsy profile`: how fast a model runs, as a profile file."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scepsy.cli.options import add_json, parse_command
from scepsy_optimizer.errors import ScepsyError

if TYPE_CHECKING:
    from rich.console import Console

    from scepsy.profiling import Lengths, Progress, ServingPoint
    from scepsy_optimizer.profile import LLMProfile

HELP = "write the profile of a model: measured on engines that are started for it, or on a running one, or estimated"

EXAMPLE = """\
  scepsy profile Qwen/Qwen3-32B --device-type H100 --llm writer --estimate
  scepsy profile Qwen/Qwen3-32B --device-type H100 --llm writer --estimate --points bench.json
  scepsy profile Qwen/Qwen3-32B --device-type H100 --llm writer --traces scepsy-traces --tensor-parallel 1,2"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", metavar="MODEL", help="Hugging Face id or directory")
    parser.add_argument("--device-type", required=True, metavar="TYPE", help="such as H100, or CPU")
    parser.add_argument("--llm", metavar="NAME", help="served model name (default: the last part of MODEL)")
    source = parser.add_argument_group("where it comes from", "by default engines are started here and measured")
    start = source.add_mutually_exclusive_group()
    start.add_argument("--estimate", action="store_true", help="estimate it, without any device (scepsy[estimate])")
    start.add_argument("--from", dest="profile", metavar="FILE", help="take this profile, to correct it")
    source.add_argument(
        "--endpoint",
        metavar="URL",
        help="measure this running engine, which nobody else may use; with --estimate or --from, correct that by it",
    )
    source.add_argument(
        "--points",
        nargs="+",
        default=[],
        metavar="REPORT",
        help="correct it by the JSON of vllm bench serve, guidellm or aiperf; REPORT@2 if tensor_parallel_size was 2",
    )
    parser.add_argument("--tensor-parallel", default="1", metavar="SIZES", help="such as 1,2,4 (default: 1)")
    parser.add_argument("--fractions", default="1", metavar="PARTS", help="of one device, such as 1,0.5 (default: 1)")
    parser.add_argument("--traces", nargs="+", metavar="PATH", help="also send loads of this LLM's traced lengths")
    parser.add_argument(
        "--requests", type=int, default=100, metavar="N", help="of each load, of which there are 10 (default: 100)"
    )
    parser.add_argument("--engine", choices=("vllm", "vllm-cpu"), default="vllm", help="default: vllm")
    parser.add_argument("--command", dest="engine_command", metavar="WORDS", help="how to start one engine")
    parser.add_argument("--max-num-seqs", type=int, default=256, metavar="N", help="vLLM's (default: 256)")
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192, metavar="N", help="vLLM's (default: 8192)")
    parser.add_argument("--max-model-len", type=int, default=32768, metavar="N", help="vLLM's (default: 32768)")
    parser.add_argument("-o", "--output", metavar="FILE", help="default: NAME_TYPE.yaml")
    add_json(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Profile, write, say where."""
    from scepsy.files import save_profile

    llm = args.llm or args.model.rstrip("/").rsplit("/", 1)[-1].lower()
    target = Path(args.output or f"{llm}_{args.device_type.lower()}.yaml")
    profile = _profile(args, llm, target, console)
    save_profile(profile, target)
    sizes = ", ".join(str(steps.tensor_parallel_size) for steps in profile.steps)
    console.print(f"{profile.provenance.source}: {llm} on {profile.device_type} at tensor_parallel_size {sizes}")
    if profile.provenance.note:
        console.print(profile.provenance.note, soft_wrap=True, markup=False, highlight=False)
    console.print(f"written to {target}; plan with it: scepsy optimize TRACES --profiles {target} ...", soft_wrap=True)
    if args.json:
        from pydantic import TypeAdapter

        from scepsy_optimizer.profile import LLMProfile

        print(TypeAdapter(LLMProfile).dump_json(profile).decode())
    return 0


def _profile(args: argparse.Namespace, llm: str, target: Path, console: Console) -> LLMProfile:
    from scepsy.cli.profile_progress import show_progress
    from scepsy.profiling import calibrate, traced_lengths
    from scepsy.report.progress import waiting
    from scepsy.traces import read_executions

    for option, number in (("--requests", args.requests), ("--max-num-seqs", args.max_num_seqs)):
        if number < 1:
            raise ScepsyError(f"{option} {number}: must be at least 1")
    sizes = _sizes("--tensor-parallel", args.tensor_parallel)
    points = [point for report in args.points for point in _points(report, sizes[0])]
    lengths = traced_lengths(read_executions(args.traces).executions, llm) if args.traces else ()
    found = waiting("estimating", console)(_given)(args, llm, sizes)
    if found is None or args.endpoint:
        # Finished points are kept beside the file, so that a run that was cut off goes on where it was.
        kept = target.with_suffix(".points")
        try:
            with show_progress(console) as tell:
                found = _measured(args, llm, sizes, lengths, found, kept, tell)
        except ScepsyError as error:
            hint = f" What was finished is kept in {kept}: the same command goes on from there" if kept.exists() else ""
            raise ScepsyError(f"{str(error).rstrip('.')}.{hint}" if hint else str(error)) from error
    return calibrate(found, points)


def _given(args: argparse.Namespace, llm: str, sizes: Sequence[int]) -> LLMProfile | None:
    """The profile to begin with, unless it is to be measured."""
    from scepsy.files import load_profile
    from scepsy.profiling import estimate

    if args.estimate:
        return estimate(
            args.model,
            args.device_type,
            llm=llm,
            tensor_parallel_sizes=tuple(sizes),
            max_model_len=args.max_model_len,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
        )
    if args.profile is None:
        return None
    given = load_profile(args.profile)
    if given.device_type != args.device_type.upper():
        raise ScepsyError(f"{args.profile}: is a profile for {given.device_type}, not for {args.device_type.upper()}")
    return given


def _measured(
    args: argparse.Namespace,
    llm: str,
    sizes: Sequence[int],
    lengths: Sequence[Lengths],
    given: LLMProfile | None,
    kept: Path,
    tell: Callable[[Progress], None],
) -> LLMProfile:
    """Measured at the endpoint, or on engines started here; or the given profile, corrected at the endpoint."""
    from scepsy.profiling import EngineChoice, EngineFlags, Limits, correct, measure, profile_model

    device_type = args.device_type.upper()
    if given is not None:
        if not lengths:
            raise ScepsyError("what is sent to the endpoint are traced lengths: give the traces (--traces)")
        return correct(
            given,
            args.endpoint,
            lengths=lengths,
            tensor_parallel_size=sizes[0],
            requests_per_load=args.requests,
            journal=kept,
            on_progress=tell,
        )
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
            journal=kept,
            on_progress=tell,
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
        folder=kept,
        on_progress=tell,
    )


def _points(report: str, size: int) -> Sequence[ServingPoint]:
    """The points of REPORT or REPORT@SIZE."""
    from scepsy.profiling import read_points

    path, _, suffix = report.rpartition("@")
    named = path and suffix.isdecimal()
    return read_points(path if named else report, tensor_parallel_size=int(suffix) if named else size)


def _sizes(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ScepsyError(f"{option} {text!r}: write whole numbers above 0 with commas between them, such as 1,2")
    return [int(part) for part in parts]


def _numbers(option: str, text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ScepsyError(f"{option} {text!r}: write numbers with commas between them, such as 1,2") from error
    if not all(number > 0 for number in found):
        raise ScepsyError(f"{option} {text!r}: each must be above 0")
    return found
