"""Streams, threads, graphs and devices: a call is asynchronous, and waits for nothing."""

import threading

import calls
import pytest
import torch
from calls import EVERY, WITH_DROPOUT, assert_equal
from torch.utils.checkpoint import checkpoint

import flash_attn

every_call = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())
every_dropout = pytest.mark.parametrize("make", WITH_DROPOUT.values(), ids=WITH_DROPOUT.keys())


@pytest.mark.parametrize("make", [*EVERY.values(), *WITH_DROPOUT.values()])
def test_no_call_waits_for_the_gpu(make):
    call = make()
    call()  # compiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cache_length_as_a_number_does_not_wait():
    q, k, v = (x.detach() for x in calls.leaves((2, 1, 4, 64), (2, 100, 4, 64), (2, 100, 4, 64)))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=77)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(RuntimeError, match=r"cache_seqlens is 101, but must be in \[0, 100\]"):
        flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=101)
    with pytest.raises(RuntimeError, match="passes the end of the KV cache"):
        flash_attn.flash_attn_with_kvcache(q, k, v, q, q, cache_seqlens=100)


@every_call
def test_the_current_stream_is_used(make):
    """Inputs that appear late on a side stream are waited for there, and nowhere else."""
    call = make()
    expected = call()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    x = torch.randn(2, 300, 4, 64).to(torch.bfloat16)
    late = torch.zeros_like(x)
    expected_late = flash_attn.flash_attn_func(x, x, x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(400_000_000)  # some 200 ms
        late.copy_(x)
        out = flash_attn.flash_attn_func(late, late, late)
        results = call()
    assert not stream.query(), "the call waited for its stream"
    stream.synchronize()
    assert_equal([out, *results], [expected_late, *expected])


def test_memory_of_outputs_and_workspaces_belongs_to_their_stream():
    """Many calls on two streams at once, whose buffers the allocator hands out again and again."""
    pairs = [(call, call()) for call in (calls.cache(num_splits=4), calls.dense())]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(30):
        for stream, (call, _), found in zip(streams, pairs, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(call())
    torch.cuda.synchronize()
    for (_, expected), found in zip(pairs, results, strict=True):
        for result in found:
            assert_equal(result, expected)


@every_call
def test_threads_with_streams_of_their_own(make):
    call = make()
    expected = call()
    torch.cuda.synchronize()
    failures = []

    def work():
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(4):
                    results = [call() for _ in range(5)]
                    stream.synchronize()
                    for result in results:
                        assert_equal(result, expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def captured(call):
    """A graph of one call, and its results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiled
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = call()
    return graph, results


@every_call
def test_graphs_replay_a_call(make):
    call = make()
    expected = call()
    graph, results = captured(call)
    for _ in range(3):
        for x in results:
            x.fill_(torch.nan)
        graph.replay()
        assert_equal(results, expected)


def test_graphs_see_new_inputs_and_lengths():
    q, k, v = (x.detach() for x in calls.leaves((2, 1, 8, 64), (2, 300, 2, 64), (2, 300, 2, 64)))
    lengths = calls.int32(10, 200)
    new = torch.randn_like(k[:, :1])

    def step():
        out = flash_attn.flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=lengths)
        lengths.add_(1)
        return [out]

    graph, (out,) = captured(step)
    lengths.copy_(calls.int32(10, 200))
    for i in range(40):
        q.normal_()
        new.normal_()
        before = k.clone(), v.clone()
        graph.replay()
        expected = flash_attn.flash_attn_with_kvcache(
            q, *before, new, new, cache_seqlens=calls.int32(10 + i, 200 + i)
        )
        assert_equal([out, k, v], [expected, *before])


@every_dropout
def test_every_replay_drops_something_else(make):
    call = make()
    graph, results = captured(call)
    seen = []
    for _ in range(4):
        graph.replay()
        seen.append(results[0].clone())
    for i in range(3):
        assert not torch.equal(seen[i], seen[i + 1])


@every_dropout
def test_the_seed_decides_what_is_dropped(make):
    call = make()
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(call())
    assert_equal(results[0], results[1])
    assert not torch.equal(results[0][0], results[2][0])


def test_checkpointing_drops_the_same_again():
    q, k, v = calls.leaves(*[(2, 150, 4, 64)] * 3)

    def attention(q, k, v):
        return flash_attn.flash_attn_func(q, k, v, dropout_p=0.3, deterministic=True)

    gradients = []
    for run in (attention, lambda *x: checkpoint(attention, *x, use_reentrant=False)):
        torch.manual_seed(3)
        out = run(q, k, v)
        gradients.append(
            [out.detach(), *torch.autograd.grad(out.float().square().sum(), (q, k, v))]
        )
    assert_equal(*gradients)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_call
def test_a_device_that_is_not_the_current_one(make):
    current = torch.cuda.current_device()
    other = torch.device("cuda", (current + 1) % torch.cuda.device_count())
    with other:
        call = make()
        results = call()
        assert torch.cuda.current_device() == current
        assert all(x.device == other for x in results)
        with torch.cuda.device(other):
            expected = call()
    assert_equal(results, expected)


def test_tensors_on_different_devices_are_an_error():
    q, k, v = (x.detach() for x in calls.leaves(*[(2, 15, 4, 64)] * 3))
    with pytest.raises(RuntimeError, match="must be on the same device as q"):
        flash_attn.flash_attn_func(q, k.cpu(), v)
    with pytest.raises(RuntimeError, match="must be on the same device as q"):
        flash_attn.flash_attn_func(q, k, v, alibi_slopes=torch.rand(4, device="cpu"))


def test_float32_is_refused():
    q = torch.randn(1, 5, 2, 64)
    with pytest.raises(RuntimeError, match="FlashAttention only support fp16 and bf16 data type"):
        flash_attn.flash_attn_func(q, q, q)


def test_a_call_after_a_refused_one_works():
    q, k, v = (x.detach() for x in calls.leaves(*[(2, 15, 4, 64)] * 3))
    expected = flash_attn.flash_attn_func(q, k, v)
    with pytest.raises(RuntimeError):
        flash_attn.flash_attn_func(q, k[:, :, :3], v)
    assert_equal([flash_attn.flash_attn_func(q, k, v)], [expected])
