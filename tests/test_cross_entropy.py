"""cross_entropy.py: the chunked loss is the plain one, with its gradients, in every precision."""

import pytest
import torch
from torch.nn import functional as F

from kernels import cross_entropy
from kernels.blockwise import add_product_
from model import GPT, GPTConfig


def plain(x, weight, targets):
    return F.cross_entropy(F.linear(x, weight), targets, ignore_index=-1)


def value_and_gradients(f, x, weight, targets):
    x, weight = (t.detach().clone().requires_grad_() for t in (x, weight))
    value = 3 * f(x, weight, targets)  # not 1, so that the factor of backward is seen
    value.backward()
    return value.detach(), x.grad, weight.grad


def inputs(dtype=torch.float64, N=50, C=8, V=37):
    torch.manual_seed(0)
    targets = torch.randint(V, (N,))
    targets[[3, 11]] = -1
    x, weight = torch.randn(N, C), torch.randn(V, C)
    return x.to(dtype), weight.to(dtype), targets


@pytest.mark.parametrize("chunk", [1, 37 * 7, 37 * 50, 2**24])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_it_is_cross_entropy_whatever_the_chunk(monkeypatch, chunk, dtype, bound):
    monkeypatch.setattr(cross_entropy, "SMALL_CHUNK", chunk)
    expected = value_and_gradients(plain, *inputs())
    for a, b in zip(
        value_and_gradients(cross_entropy.linear_cross_entropy, *inputs(dtype)),
        expected,
        strict=True,
    ):
        assert a.dtype == dtype and (a - b).norm() <= bound * b.norm()


@pytest.mark.parametrize("sequences", [1, 3, 7, 12, 22, 32, 64, 100])
@pytest.mark.parametrize("free_GiB", [4, 16, 80])
def test_chunks_on_a_gpu_are_large_of_equal_size_and_fit_into_the_free_memory(
    monkeypatch, sequences, free_GiB
):
    cuda, N, V = torch.device("cuda:0"), 1024 * sequences, 50304
    monkeypatch.setattr(cross_entropy, "free_bytes", lambda device: free_GiB * 2**30)
    few = cross_entropy.fewest_in_chunks(cuda)
    assert cross_entropy.is_better(few, cuda) and not cross_entropy.is_better(few - 1, cuda)
    rows = cross_entropy.rows_at_once(N, V, "cuda", few)
    assert 8 * rows * V < 2**30 * free_GiB / 5 and rows * V <= 2**28 + V
    chunks = range(0, N, rows)
    assert N - chunks[-1] > rows - len(chunks)
    if N * V >= few:
        assert rows * V >= min(2**27, few // 4)
    assert cross_entropy.rows_at_once(N, 2**40, "cuda", few) == 1


def test_a_cpu_and_other_devices_need_no_question_about_memory():
    for device, fewest in (("cpu", 2**22), ("mps", 2**30)):
        assert cross_entropy.is_better(fewest, torch.device(device))
        assert not cross_entropy.is_better(fewest - 1, torch.device(device))
    assert cross_entropy.rows_at_once(12288, 50304, "cpu", 0) == 2**24 // 50304


def test_half_precision_products_are_added_up_in_float32():
    """torch has this operation for CUDA only; here a stand-in takes its place on the CPU."""

    def stand_in(acc, a, b, out_dtype, beta=1, alpha=1, *, out):
        assert out.dtype == out_dtype
        return out.copy_(beta * acc + alpha * (a.float() @ b.float()))

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("baddbmm.dtype_out", stand_in, "CPU")
        acc, a, b = torch.randn(2, 3, 5), *(torch.randn(2, *s).half() for s in ((3, 4), (4, 5)))
        for beta in (0.0, 1.0):
            expected = beta * acc + 0.5 * (a.float() @ b.float())
            add_product_(acc, a, b, alpha=0.5, beta=beta)
            torch.testing.assert_close(acc, expected)


def test_under_autocast_gradients_are_closer_than_those_of_the_plain_loss():
    expected = value_and_gradients(plain, *inputs())
    x, weight, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        fused = value_and_gradients(cross_entropy.linear_cross_entropy, x, weight, targets)
        usual = value_and_gradients(plain, x, weight, targets)
    for a, b, c in zip(fused, usual, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a - c).norm() <= min((b - c).norm(), 1e-2 * c.norm())


def test_float16_products_do_not_lose_small_gradients():
    """n V = 6 * 10^7: an entry of G / n is below what float16 can hold, one of G is not."""
    N, V = 3000, 20000
    x, weight, targets = inputs(torch.float32, N=N, C=4, V=V)
    known = targets != -1
    x_known, n = x[known].double(), known.sum()
    dW = (x_known.sum(0) / V).expand(V, -1).clone()  # where all logits are 0, G = 1 / V - onehot
    dW = dW.index_add_(0, targets[known], -x_known) / n
    got = cross_entropy._linear_cross_entropy(x, weight * 0, targets, torch.float16, True, True)
    assert not got[1].any()
    assert (got[2] - dW).norm() <= 1e-2 * dW.norm()
    rare = torch.ones(V, dtype=torch.bool).index_fill_(0, targets[known], False)
    assert (got[2] - dW)[rare].norm() <= 1e-2 * dW[rare].norm()


def test_no_target_at_all_is_nan_as_in_torch():
    x, weight, targets = inputs()
    targets.fill_(-1)
    assert cross_entropy.linear_cross_entropy(x, weight, targets).isnan()
    assert plain(x, weight, targets).isnan()


def test_it_is_a_sound_operator_and_no_graph_break():
    x, weight, targets = inputs()
    args = (x.requires_grad_(), weight.requires_grad_(), targets, torch.float64, True, True)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(cross_entropy._linear_cross_entropy, args, test_utils=checks)
    compiled = torch.compile(
        cross_entropy.linear_cross_entropy, fullgraph=True, backend="aot_eager"
    )
    for a, b in zip(
        value_and_gradients(compiled, *inputs()), value_and_gradients(plain, *inputs()), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_the_model_takes_it_where_logits_are_many_and_not_wanted(monkeypatch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8))
    idx, targets = torch.randint(11, (2, 2, 8))
    logits, usual = model(idx, targets)
    assert logits.shape == (2, 8, 11)
    calls = []
    monkeypatch.setattr(cross_entropy, "is_better", lambda n, device: calls.append(n) or True)
    nothing, fused = model(idx, targets, with_logits=False)
    assert nothing is None and calls == [2 * 8 * 11]
    torch.testing.assert_close(fused, usual)
    usual.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    fused.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("largest", [2**28, 2**16])
def test_on_a_gpu_too(monkeypatch, largest):
    monkeypatch.setattr(cross_entropy, "CUDA_CHUNK", largest)
    expected = value_and_gradients(plain, *inputs(N=512, C=64, V=1000))
    x, weight, targets = (t.cuda() for t in inputs(torch.float32, N=512, C=64, V=1000))
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            got = value_and_gradients(cross_entropy.linear_cross_entropy, x, weight, targets)
        for a, b in zip(got, expected, strict=True):
            assert (a.cpu() - b).norm() <= bound * b.norm()


def test_a_frozen_output_layer_costs_no_gradient():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(11, 8)
    targets = torch.randint(11, (4,))
    assert (
        cross_entropy._linear_cross_entropy(x, weight, targets, x.dtype, True, False)[2].numel()
        == 0
    )
    cross_entropy.linear_cross_entropy(x, weight, targets).backward()
    expected = torch.autograd.grad(F.cross_entropy(x @ weight.T, targets), x)[0]
    torch.testing.assert_close(x.grad, expected)
