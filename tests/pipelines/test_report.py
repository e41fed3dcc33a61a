import pytest
import torch

from dit_sparse.kernels.blocks import Density
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.pipelines.report import Record, mean_density

CPU = torch.device("cpu")
GRID, OTHER = TokenGrid(1, 2, 2), TokenGrid(1, 2, 4)


def test_densities_are_averaged_over_calls_with_and_without_the_dense_ones() -> None:
    record = Record()
    for layer, grid, dense in (
        ("a", GRID, None), ("a", GRID, None), ("a", OTHER, None), ("b", GRID, "warm-up"),
    ):  # fmt: skip
        with record.call(layer, grid, dense, CPU):
            pass
    report = record.report(
        ["a", "b", "c"],
        lambda _, grid: Density(0.1, 0.2, 0.3) if grid == GRID else Density(0.4, 0.5, 0.6),
    )
    assert report.density_sparse is not None
    assert report.density is not None
    assert report.density_sparse.element == pytest.approx((0.1 * 2 + 0.4) / 3)
    assert report.density.block == pytest.approx((0.2 * 2 + 0.5 + 1) / 4)
    assert report.density.weighted == pytest.approx((0.3 * 2 + 0.6 + 1) / 4)
    assert [layer.sparse_calls for layer in report.layers] == [3, 0, 0]
    assert [layer.dense_calls for layer in report.layers] == [{}, {"warm-up": 1}, {}]
    assert report.layers[0].density == report.density_sparse
    assert report.layers[1].density is None
    assert report.dense_calls == {"warm-up": 1}
    assert str(report).endswith("never sparse: b, c")


def test_a_call_that_fails_is_not_counted() -> None:
    record = Record()
    with pytest.raises(RuntimeError), record.call("a", GRID, None, CPU):
        raise RuntimeError
    report = record.report(["a"], lambda *_: Density(1.0, 1.0, 1.0))
    assert report.sparse_calls == 0
    assert report.density is report.density_sparse is None
    assert report.seconds == 0.0


def test_the_mean_of_no_density_is_none() -> None:
    assert mean_density([]) is None
    assert mean_density([(Density(0.5, 0.5, 0.5), 2)]) == Density(0.5, 0.5, 0.5)
