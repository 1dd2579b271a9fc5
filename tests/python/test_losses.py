"""Cross entropy against its formula in float64, and over two processes."""

import pytest
import torch
import torch.multiprocessing as multiprocessing

from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops import cross_entropy
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

IGNORED = -100


def reference_losses(
    logits, labels, label_smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0, ignore_index=IGNORED
):
    """(losses, z_losses) by the formula, in the dtype of the logits."""
    s = logits * logit_scale
    lse = torch.logsumexp(s, dim=-1)
    ignored = labels == ignore_index
    at_label = s.gather(1, labels.masked_fill(ignored, 0)[:, None])[:, 0]
    losses = lse - (1 - label_smoothing) * at_label - label_smoothing * s.mean(dim=-1)
    z_losses = lse_square_scale * lse**2
    return (losses + z_losses).masked_fill(ignored, 0.0), z_losses.masked_fill(ignored, 0.0)


OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "scale": {"logit_scale": 0.7},
    "z_loss": {"lse_square_scale": 1e-2},
    "all": {"label_smoothing": 0.1, "logit_scale": 1.3, "lse_square_scale": 1e-2},
}


def inputs(rows=13, columns=101, dtype=torch.float32):
    logits = (torch.randn(rows, columns) * 3).to(dtype)
    labels = torch.randint(0, columns, (rows,))
    labels[::5] = IGNORED
    return logits, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_losses_and_gradients(name, dtype):
    logits, labels = inputs(dtype=dtype)
    logits.requires_grad_()
    losses, z_losses = cross_entropy_loss(logits, labels, **OPTIONS[name])
    exact = logits.detach().double().requires_grad_()
    expected, expected_z = reference_losses(exact, labels, **OPTIONS[name])
    # The loss is computed in float32 whatever the dtype.
    assert losses.dtype == z_losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected.float())
    torch.testing.assert_close(z_losses, expected_z.float())
    assert not z_losses.requires_grad

    weights = torch.randn(len(labels))
    (gradient,) = torch.autograd.grad(losses, logits, weights)
    (expected_gradient,) = torch.autograd.grad(expected, exact, weights.double())
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, expected_gradient.to(dtype))
    assert (gradient[::5] == 0).all()


@pytest.mark.cpu  # one element after the other
def test_gradcheck():
    logits, labels = inputs(rows=4, columns=7, dtype=torch.float64)
    logits.requires_grad_()
    for options in OPTIONS.values():
        assert torch.autograd.gradcheck(
            lambda x, options=options: cross_entropy_loss(x, labels, **options)[0], logits
        )


@pytest.mark.parametrize("name", OPTIONS)
def test_rows_are_taken_in_blocks(name, monkeypatch):
    logits, labels = inputs(rows=29)
    expected, _ = reference_losses(logits.double(), labels, **OPTIONS[name])
    monkeypatch.setattr(cross_entropy, "_BLOCK_ELEMENTS", 3 * 101)
    losses, _ = cross_entropy_loss(logits, labels, **OPTIONS[name])
    torch.testing.assert_close(losses, expected.float())


def test_inplace_backward_reuses_the_logits():
    logits, labels = inputs()
    given = logits.clone().requires_grad_()
    hidden = given * 1
    losses, _ = cross_entropy_loss(hidden, labels, inplace_backward=True)
    losses.sum().backward()
    plain = logits.clone().requires_grad_()
    cross_entropy_loss(plain, labels)[0].sum().backward()
    assert torch.equal(given.grad, plain.grad)
    assert torch.equal(hidden.detach(), plain.grad)


def test_precomputed_lse():
    logits, labels = inputs()
    lse = torch.logsumexp(logits, dim=-1)
    losses, _ = cross_entropy_loss(logits, labels, precomputed_lse=lse)
    torch.testing.assert_close(losses, cross_entropy_loss(logits, labels)[0])
    with pytest.raises(RuntimeError, match="precomputed_lse must have shape"):
        cross_entropy_loss(logits, labels, precomputed_lse=lse[1:])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_module_agrees_with_torch(reduction):
    logits, labels = inputs()
    loss = CrossEntropyLoss(reduction=reduction, label_smoothing=0.1)(logits, labels)
    expected = torch.nn.CrossEntropyLoss(reduction=reduction, label_smoothing=0.1)(logits, labels)
    torch.testing.assert_close(loss, expected)


def test_module_returns_z_loss():
    logits, labels = inputs()
    loss, z_loss = CrossEntropyLoss(lse_square_scale=0.1, return_z_loss=True)(logits, labels)
    plain = CrossEntropyLoss()(logits, labels)
    torch.testing.assert_close(loss - z_loss, plain)


def test_ignore_index():
    logits, labels = inputs()
    labels[labels == IGNORED] = 0
    logits[labels == 0] = torch.nan  # an ignored row is not looked at
    logits.requires_grad_()
    loss = CrossEntropyLoss(ignore_index=0)(logits, labels)
    kept = labels != 0
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(logits.detach()[kept], labels[kept])
    )
    loss.backward()
    assert (logits.grad[~kept] == 0).all() and logits.grad.isfinite().all()


def test_no_rows():
    logits = torch.randn(0, 5, requires_grad=True)
    loss = CrossEntropyLoss(reduction="sum")(logits, torch.zeros(0, dtype=torch.int64))
    assert loss == 0
    loss.backward()
    assert logits.grad.shape == (0, 5)


def test_compile():
    logits, labels = inputs()
    logits.requires_grad_()
    loss = torch.compile(CrossEntropyLoss(lse_square_scale=0.1), backend="aot_eager")
    compiled = loss(logits, labels)
    (gradient,) = torch.autograd.grad(compiled, logits)
    eager = CrossEntropyLoss(lse_square_scale=0.1)(logits, labels)
    (expected,) = torch.autograd.grad(eager, logits)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(gradient, expected)


def test_bad_input():
    logits, labels = inputs()
    with pytest.raises(ValueError, match="reduction must be 'mean', 'none' or 'sum', got 'max'"):
        CrossEntropyLoss(reduction="max")
    with pytest.raises(RuntimeError, match="logits must have shape"):
        cross_entropy_loss(logits, labels[1:])


@pytest.mark.cpu  # on a GPU it would have to wait to see them
def test_labels_out_of_range():
    logits, labels = inputs()
    for wrong in (101, -1):
        labels[3] = wrong
        with pytest.raises(RuntimeError, match=rf"labels must be in \[0, 101\).*got {wrong}"):
            cross_entropy_loss(logits, labels)


def _one_process(rank, store, logits, labels, options, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    half = logits.shape[1] // 2
    part = logits[:, rank * half : (rank + 1) * half].clone().requires_grad_()
    loss = CrossEntropyLoss(
        reduction="none", process_group=torch.distributed.group.WORLD, **options
    )
    losses = loss(part, labels)
    losses.sum().backward()
    results[rank] = (losses.detach(), part.grad)
    torch.distributed.destroy_process_group()


@pytest.mark.cpu  # as gloo is
def test_vocabulary_over_two_processes(tmp_path):
    """The vocabulary's parts on two processes give the losses and gradients of the whole."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch is built without gloo")
    logits, labels = inputs(columns=100)
    options = OPTIONS["all"]
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(
            _one_process, (tmp_path / "store", logits, labels, options, results), nprocs=2
        )
        parts = [results[0], results[1]]
    exact = logits.double().requires_grad_()
    expected, _ = reference_losses(exact, labels, **options)
    expected.sum().backward()
    for losses, _ in parts:
        torch.testing.assert_close(losses, expected.detach().float())
    gradient = torch.cat([gradient for _, gradient in parts], dim=1)
    torch.testing.assert_close(gradient, exact.grad.float())
