"""Every operator that is claimed, on the onnx package's own backend node cases."""

import pytest
import torch

from tests.formats.torch_module import cases


@pytest.fixture(scope="module")
def results() -> tuple:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield cases.run()
    torch.set_num_threads(threads)


def test_cases_pass_but_for_known_reasons(results: tuple) -> None:
    counts, wrong, expanded = results
    print(cases.page(*results))
    others = {name: count for name, count in counts.items() if name not in cases.claimed()}
    unknown = {n: w for n, w in wrong.items() if cases.reason(n) is None and cases.operator_by_name(n, others) is None}
    assert not unknown
    assert sum(c[0] for c in counts.values()) >= 1270
    assert expanded[0] >= 464


def test_page_lists_the_same(results: tuple) -> None:
    assert cases.PAGE.read_text(encoding="utf8").splitlines() == cases.page(*results).splitlines(), (
        f"run python {cases.__file__}"
    )
