"""A plan as one HTML page: what sits where, where the time goes, what else could be had, how to deploy it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from scepsy.report.page import fill_template, write_text
from scepsy.report.sentences import describe_plan
from scepsy.report.tables import groups_words, replica_words
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.frontier import EVERY_COUNT, FrontierPoint
from scepsy_optimizer.plan import LLMPlan, Plan

FORMAT: Final = "scepsy-plan-page/1"


def write_plan_page(plan: Plan, path: str | Path, *, name: str, frontier: Sequence[FrontierPoint] = ()) -> None:
    """Write the page of a plan, of which `name` is the file. Raises ScepsyError."""
    write_text(render_plan_page(plan, name=name, frontier=frontier), path)


def render_plan_page(plan: Plan, *, name: str, frontier: Sequence[FrontierPoint] = ()) -> str:
    """The page of a plan, of which `name` is the file; with a frontier (`explore`) it can be asked "what if".

    Raises ScepsyError for a plan beyond saturation, whose latency is infinite.
    """
    try:
        return fill_template("plan_page.html", summarise_plan(plan, name=name, frontier=frontier))
    except ValueError as error:
        raise ScepsyError(f"{name}: has figures that are not finite; plan anew with scepsy optimize") from error


def summarise_plan(plan: Plan, *, name: str, frontier: Sequence[FrontierPoint] = ()) -> dict[str, Any]:
    """All that the page shows, ready to be written as JSON."""
    llms = list(dict.fromkeys(part.llm for part in plan.llms))
    used = {(slot.node, device) for part in plan.llms for slot in part.slots for device in slot.devices}
    return {
        "format": FORMAT,
        "name": name,
        "rate_rps": plan.rate_rps,
        "device_type": plan.cluster.device_type,
        "devices": plan.cluster.devices,
        "used_devices": len(used),
        "taken_devices": sum(part.device_count for part in plan.llms),
        "nodes": _nodes(plan),
        "llms": [_llm(plan, llm) for llm in llms],
        "prediction": asdict(plan.prediction) if plan.prediction else None,
        "words": describe_plan(plan),
        "what_if": _what_if(plan, frontier) if frontier else None,
        "commands": _commands(plan, name),
        "provenance": dict(plan.provenance),
    }


def _nodes(plan: Plan) -> list[dict[str, Any]]:
    """Every node with its domains, and on every device the parts that replicas have of it."""
    parts: dict[tuple[str, int], list[dict[str, Any]]] = {}
    numbers: dict[str, int] = {}
    for part in plan.llms:
        for slot in part.slots:
            number = numbers.get(part.llm, 0)
            numbers[part.llm] = number + 1
            for rank, device in enumerate(slot.devices):
                shown = {
                    "llm": part.llm,
                    "replica": f"{part.llm}-{number}",
                    "fraction": part.fraction,
                    "rank": rank,
                    "ranks": part.tensor_parallel_size,
                    "utilisation": part.utilisation,
                }
                parts.setdefault((slot.node, device), []).append(shown)
    return [
        {
            "name": node.name,
            "device_type": node.device_type,
            "memory_gib": node.memory_gib,
            "domains": [
                [{"number": device, "parts": parts.get((node.name, device), [])} for device in domain]
                for domain in node.nvlink_domains
            ],
        }
        for node in plan.cluster.nodes
    ]


def _llm(plan: Plan, llm: str) -> dict[str, Any]:
    groups = plan.parts(llm)
    latency_s = plan.prediction.llm_latency_s.get(llm) if plan.prediction else None
    return {
        "llm": llm,
        "model": groups[0].model,
        "share": groups[0].share,
        "latency_s": latency_s,
        "words": groups_words(groups),
        "groups": [_group(part) for part in groups],
    }


def _group(part: LLMPlan) -> dict[str, Any]:
    return {
        "each": replica_words(part),
        "replicas": part.replicas,
        "devices": part.device_count,
        "rate_rps": part.rate_rps,
        "utilisation": part.utilisation,
        "call_s": part.predicted_call_s,
    }


def _what_if(plan: Plan, frontier: Sequence[FrontierPoint]) -> dict[str, Any]:
    """For every rate and number of devices of the frontier the best that it has: a cell, or None where out of reach.

    A point that another beats is not in the frontier; the one that beats it has no more devices and no lower rate.
    """
    rates = sorted({plan.rate_rps, *(point.rate_rps for point in frontier)})
    tried = {plan.cluster.devices, *(point.devices for point in frontier)}
    counts = sorted(tried) if max(tried) > EVERY_COUNT else list(range(min(tried), max(tried) + 1))
    return {
        "rates": rates,
        "devices": counts,
        "cells": [[_best(frontier, rate, count) for count in counts] for rate in rates],
    }


def _best(frontier: Sequence[FrontierPoint], rate_rps: float, devices: int) -> dict[str, Any] | None:
    within = [point for point in frontier if point.rate_rps >= rate_rps and point.devices <= devices]
    if not within:
        return None
    best = min(within, key=lambda point: (point.latency_s, point.devices))
    return {
        "latency_s": best.latency_s,
        "devices": best.devices,
        "llms": {llm: groups_words(groups) for llm, groups in best.allocation.items()},
    }


def _commands(plan: Plan, name: str) -> list[dict[str, str]]:
    file = shlex.quote(name)
    local = [
        ("Can it be deployed here?", f"scepsy doctor {file}"),
        ("On this machine, behind one OpenAI-compatible endpoint", f"scepsy deploy {file}"),
    ]
    far = [
        ("On a Ray cluster", f"scepsy deploy {file} --to ray"),
        ("On Kubernetes", f"scepsy deploy {file} --to kubernetes --mode agent --image IMAGE | kubectl apply -f -"),
        ("Instead of what runs", f"scepsy apply {file}"),
        ("Without GPUs, at the speed of the profiles", f"scepsy deploy {file} --engine emulator"),
    ]
    return [
        {"what": what, "command": command} for what, command in ([] if len(plan.cluster.nodes) > 1 else local) + far
    ]
