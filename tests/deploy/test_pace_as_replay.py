"""The emulator's pacing on a clock that jumps gives exactly the times of a replay: it is the same engine."""

import asyncio
import random
from fractions import Fraction

import pytest

from scepsy.emulator.pace import Pacer
from scepsy.profiling import shipped_profiles
from scepsy_optimizer.allocation import Choice
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.engine import Engine
from scepsy_optimizer.executions import Call, Execution, Span
from scepsy_optimizer.planner import hand_made_plan
from scepsy_optimizer.replay import replay
from scepsy_optimizer.timeline import compile_timeline


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop that does not wait for its next timer but sets its clock to it."""

    def __init__(self):
        super().__init__()
        self._now = 0.0
        waits = self._selector.select

        def select(timeout):
            self._now += timeout or 0.0
            return waits(0)

        self._selector.select = select

    def time(self):
        return self._now


def one_call(number, tokens):
    root = Span(id="r", parent=None, name="w", kind="workflow", start_s=0, end_s=1)
    call = Call(llm="verifier", input_tokens=tokens[0], output_tokens=tokens[1])
    span = Span(id="c", parent="r", name="m", kind="llm", start_s=0, end_s=1, call=call)
    return compile_timeline(Execution(id=f"e{number}", workflow="w", spans=(root, span)))


@pytest.mark.parametrize("rate", [3.0, 60.0])
def test_paced_calls_end_when_replay_says(rate):
    rng = random.Random(4)
    profile = shipped_profiles("H100")["verifier"]
    arrivals, lengths, now = [], [], 0.0
    for _ in range(400):
        now += rng.expovariate(rate)
        arrivals.append(now)
        lengths.append((rng.randint(1, 4000), rng.randint(1, 120)))

    async def pace():
        loop = asyncio.get_running_loop()
        pacer = Pacer(Engine(profile, tensor_parallel_size=1, fraction=1.0))
        generations = []

        def submit(number):
            prompt, output = lengths[number]
            generations.append(pacer.submit(prompt_tokens=prompt, output_tokens=output, arrived_s=loop.time()))

        for number, arrival in enumerate(arrivals):
            loop.call_at(arrival + profile.request_s, submit, number)
        await asyncio.sleep(arrivals[-1] + 1)
        await asyncio.gather(*(generation.done for generation in generations))
        return [generation.finished_s for generation in generations]

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        paced = runner.run(pace())
    choices = {"verifier": (Choice(tensor_parallel_size=1, fraction=Fraction(1), replicas=1),)}
    plan = hand_made_plan(choices, {"verifier": profile}, parse_cluster("1xH100"))
    timelines = [one_call(number, tokens) for number, tokens in enumerate(lengths)]
    replayed = replay(plan, {"verifier": profile}, timelines, arrivals)
    ends = sorted((call.execution, call.end_s) for call in replayed.calls)
    assert paced == pytest.approx([end for _, end in ends], abs=1e-9)
