import pytest

from dit_sparse.kernels.blocks import Density
from dit_sparse.pipelines.memory import Memory
from dit_sparse.pipelines.report import DENSE, Call, Record


def test_densities_and_flops_are_averaged_over_calls_with_and_without_the_dense_ones() -> None:
    record = Record()
    low, high = Density(0.1, 0.2, 0.3), Density(0.4, 0.5, 0.6)
    for layer, call in (
        ("a", Call(low, 0.2)), ("a", Call(low, 0.2)), ("a", Call(high, 0.7)),
        ("b", Call(DENSE, 1.0, "warm-up")), ("b", Call(DENSE, 1.5, "renewal")),
    ):  # fmt: skip
        record.add(layer, call)
    memory = Memory()
    memory.peak, memory.dropped = 12_000_000, 3
    report = record.report(["a", "b", "c"], 2.0, {"attention": 1.5}, memory)
    assert report.density_sparse is not None
    assert report.density is not None
    assert report.density_sparse.element == pytest.approx((0.1 * 2 + 0.4) / 3)
    assert report.density.block == pytest.approx((0.2 * 2 + 0.5 + 2) / 5)
    assert report.density.weighted == pytest.approx((0.3 * 2 + 0.6 + 2) / 5)
    assert report.flops == pytest.approx((0.2 * 2 + 0.7 + 1 + 1.5) / 5)
    assert [layer.sparse_calls for layer in report.layers] == [3, 0, 0]
    assert [layer.dense_calls for layer in report.layers] == [
        {},
        {"warm-up": 1, "renewal": 1},
        {},
    ]
    assert report.layers[0].density == report.density_sparse
    assert report.layers[1].density is None
    assert report.dense_calls == {"warm-up": 1, "renewal": 1}
    assert (report.seconds, report.stages) == (2.0, {"attention": 1.5})
    text = str(report)
    assert "attention FLOPs: 0.720 of dense" in text
    assert "caches: 12.0 MB at most, 3 did not fit" in text
    assert text.endswith("never sparse: b, c")


def test_before_the_first_call_nothing_is_known() -> None:
    report = Record().report(["a"], 0.0, {}, Memory())
    assert report.sparse_calls == 0
    assert report.density is report.density_sparse is report.flops is None
