"""What `import scepsy` offers, pinned: a name that comes or goes is a decision, not an accident."""

import pytest

import scepsy

PUBLIC = {
    *(
        "Cluster",
        "ContextThreadPoolExecutor",
        "Deployment",
        "LLMProfile",
        "LLMRequirements",
        "Plan",
        "Requirements",
        "ScepsyError",
        "WorkflowRequirements",
        "Workload",
    ),
    *("agent", "aggregate", "deploy", "estimate", "flush", "frontier", "instrument", "optimize", "optimize_and_deploy"),
    *(
        "discover_cluster",
        "load_cluster",
        "load_plan",
        "load_profile",
        "load_requirements",
        "save_cluster",
        "save_plan",
        "save_profile",
    ),
    *("propagate", "read_executions", "tool", "uninstrument", "workflow"),
}


def test_the_public_names_are_these():
    assert sorted(PUBLIC) == scepsy.__all__
    assert set(dir(scepsy)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_each_is_there_and_says_what_it_is(name):
    value = getattr(scepsy, name)
    assert callable(value)
    assert value.__doc__


def test_others_are_not():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = scepsy.nonsense
