import os
import zlib
from collections import defaultdict

import pytest
import torch
from hypothesis import settings

from tests.programs import Programs

# Tiny tensors: a thread that waits for a busy neighbour costs more than all of them compute. The same for processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("suite", deadline=None, derandomize=True, database=None)
settings.load_profile("suite")


LONG_FILES = ("test_app.py", "test_resume.py", "test_distributed.py", "test_benchmark.py", "test_readme.py")


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="run what is tested for several flows with each of them, and every kill point")


def pytest_configure(config):
    config.addinivalue_line("markers", "thorough: left out without --thorough")
    config.addinivalue_line("markers", "sampled(count=2): without --thorough, so many of the parameter sets, spread evenly")
    config.addinivalue_line("markers", "first_flow: without --thorough, the flow is fx")


def pytest_collection_modifyitems(config, items):
    """Begin with the files that take longest, so that no process is left with one of them at the end.

    Without ``--thorough``, keep one flow of each test that has the parameter ``flow``, and a few parameter sets of the sampled ones. Each
    flow is that of a third of the tests.
    """
    items.sort(key=lambda item: item.path.name not in LONG_FILES)
    if config.getoption("--thorough") or any("[" in argument for argument in config.args):
        return
    flows = defaultdict(set)
    for item in items:
        flows[what_is_tested(item)].add(flow_of(item))
    kept = [item for item in items if not item.get_closest_marker("thorough") and flow_of(item) == chosen(item, flows)]
    kept = sampled(kept)
    keeping = {*kept}
    config.hook.pytest_deselected(items=[item for item in items if item not in keeping])
    items[:] = kept


def sampled(items):
    """Return the tests without the parameter sets that only ``--thorough`` runs."""
    sets = defaultdict(list)
    for item in items:
        sets[item.nodeid.partition("[")[0]].append(item)
    left_out = set()
    for those in sets.values():
        marker = those[0].get_closest_marker("sampled")
        count = len(those) if marker is None else min(len(those), *(marker.args or (2,)))
        spread = {those[index * len(those) // count] for index in range(count)}
        left_out |= {*those} - spread
    return [item for item in items if item not in left_out]


def flow_of(item):
    flow = item.callspec.params.get("flow") if hasattr(item, "callspec") else None
    return flow if isinstance(flow, str) else None


def what_is_tested(item):
    """Return the test with its parameters, but for the flow."""
    name, _, parameters = item.nodeid.partition("[")
    return name, parameters.replace(flow_of(item) or "", "", 1)


def chosen(item, flows):
    """Return the flow that a test is run with: where a fixture that costs much makes something for all tests of a module, the same."""
    if flow_of(item) is None or item.get_closest_marker("first_flow"):
        return flow_of(item) and "fx"
    candidates = sorted(flows[what_is_tested(item)])
    return candidates[zlib.crc32(repr(what_is_tested(item)).encode()) % len(candidates)]


@pytest.fixture(scope="session")
def thorough(request):
    """Whether every flow is tested."""
    return request.config.getoption("--thorough")


@pytest.fixture(scope="session")
def programs():
    """Runs Python programs in forks of a process that has imported PyTorch, which saves each of them that."""
    with Programs() as programs:
        yield programs
