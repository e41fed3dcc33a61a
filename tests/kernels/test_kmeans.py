"""Clusters of tokens, against Lloyd's algorithm written out in float64."""

import re

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels.kmeans import Clusters, kmeans
from dit_sparse.kernels.rows import sample_rows

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}


def lloyd(points: Tensor, centroid: Tensor, iterations: int) -> tuple[list[int], Tensor]:
    """Labels and centroids, token by token: `points` float64 `[n, dim]`."""
    labels: list[int] = []
    for _ in range(iterations):
        labels = [min(range(len(centroid)), key=lambda c: _gap(p, centroid[c])) for p in points]
        centroid = centroid.clone()
        for c in set(labels):
            centroid[c] = points[[i for i, label in enumerate(labels) if label == c]].mean(0)
    return labels, centroid


def _gap(point: Tensor, centroid: Tensor) -> float:
    return float((point - centroid).square().sum())


def flat(tokens: Tensor, head: int) -> Tensor:
    """Samples side by side, float64 `[n, batch * head_dim]`."""
    return torch.cat(tuple(tokens[:, :, head].double()), -1)


def assert_partition(clusters: Clusters, tokens: Tensor) -> None:
    """Sizes count the members, and centroids are their means."""
    for head, label in enumerate(clusters.label):
        numbers = clusters.size.shape[1]
        assert label.min() >= 0
        assert label.max() < numbers
        for c in range(numbers):
            members = tokens[:, label == c, head].double()
            assert members.shape[1] == clusters.size[head, c]
            if members.shape[1]:
                torch.testing.assert_close(
                    clusters.centroid[:, head, c].double(), members.mean(1), atol=1e-5, rtol=1e-4
                )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_it_is_the_algorithm_of_lloyd(
    dtype: torch.dtype, batch: int, iterations: int, operands
) -> None:
    tokens, _, _ = operands(61, 2, 8, batch=batch, dtype=dtype)
    came = kmeans(tokens, 7, iterations)
    assert came.centroid.dtype == torch.promote_types(dtype, torch.float32)
    first = sample_rows(61, 7)
    for head in range(2):
        points = flat(tokens, head)
        labels, centroid = lloyd(points, points[first], iterations)
        assert came.label[head].tolist() == labels
        torch.testing.assert_close(
            torch.cat(tuple(came.centroid[:, head]), -1).double(),
            centroid,
            atol=TOLERANCE[dtype],
            rtol=TOLERANCE[dtype],
        )
    assert_partition(came, tokens)


def test_it_goes_on_from_centroids(operands) -> None:
    tokens, _, _ = operands(61, 2, 8)
    begun = kmeans(tokens, 7, 2)
    gone_on = kmeans(tokens, 7, 3, begun.centroid)
    at_once = kmeans(tokens, 7, 5)
    assert torch.equal(gone_on.label, at_once.label)
    assert torch.equal(gone_on.centroid, at_once.centroid)


@pytest.mark.parametrize("batch", [1, 2])
def test_planted_clusters_are_found(batch: int) -> None:
    generator = torch.Generator().manual_seed(5)
    planted = torch.randint(0, 6, (2, 180), generator=generator)
    centers = 10 * torch.randn(batch, 2, 6, 16, generator=generator)
    tokens = torch.stack([centers[:, head, planted[head]] for head in range(2)], 2)
    tokens = tokens + 0.1 * torch.randn(tokens.shape, generator=generator)
    # More clusters than were planted, so that none of these begins without a centroid.
    came = kmeans(tokens, 40, 20)
    for head in range(2):
        for c in came.label[head].unique():
            assert len(planted[head][came.label[head] == c].unique()) == 1


def test_S23_labels_partition_tokens_and_clusters_may_be_empty(operands) -> None:
    tokens, _, _ = operands(50, 2, 8)
    # Five different tokens only: most of twelve clusters have no member.
    tokens = tokens[:, torch.arange(50) % 5]
    came = kmeans(tokens, 12, 4)
    assert ((came.size > 0).sum(-1) == 5).all()
    assert (came.size.sum(-1) == 50).all()
    assert came.centroid.isfinite().all()
    assert_partition(came, tokens)
    # A cluster without members stays where it was, and may have some again.
    start = torch.full((2, 2, 2, 8), 1e3)
    start[:, :, 0] = 0
    came = kmeans(tokens, 2, 3, start)
    assert came.size[0].tolist() == [50, 0]
    assert (came.centroid[:, :, 1] == 1e3).all()


def test_as_many_clusters_as_different_tokens_hold_one_each(operands) -> None:
    tokens, _, _ = operands(23, 1, 8)
    for clusters in (23, 100):
        came = kmeans(tokens, clusters, 3)
        assert came.label[0].tolist() == list(range(23))
        assert torch.equal(came.centroid[:, 0], tokens[:, :, 0])


def test_many_tokens_are_taken_in_steps(operands, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, _, _ = operands(61, 2, 8)
    whole = kmeans(tokens, 7, 3)
    monkeypatch.setattr("dit_sparse.kernels.kmeans._AT_ONCE", 7 * 9)
    assert torch.equal(kmeans(tokens, 7, 3).label, whole.label)


def test_it_draws_no_random_number_and_strides_do_not_matter(operands) -> None:
    tokens, _, _ = operands(61, 2, 8)
    state = torch.random.get_rng_state()
    first = kmeans(tokens, 7, 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    turned = tokens.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
    again = kmeans(turned, 7, 3)
    assert torch.equal(again.label, first.label)
    assert torch.equal(again.centroid, first.centroid)


def test_centroids_of_another_clustering_are_refused(operands) -> None:
    tokens, _, _ = operands(61, 2, 8)
    message = (
        "centroid must be (2, 2, 7, 8) for tokens (2, 61, 2, 8) in 7 clusters, got (2, 2, 6, 8)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        kmeans(tokens, 7, 3, torch.zeros(2, 2, 6, 8))
