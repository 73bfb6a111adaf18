"""The op `lowrank.add` and sums of Kronecker products: values, gradients, dtypes, strides, opcheck, compile, FLOPs;
`lowrank.linear`, which runs a frozen layer as one with what is added."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from leanvit.kernels import lowrank, products


def numbers(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(dtype=torch.float64, tokens=(2, 5), width=6, out=15, ranks=(3, 2), bias=True):
    """y, x, factors, bias, first of two ranges of an output with rows that belong to neither."""
    y, x = numbers(*tokens, out, dtype=dtype, seed=1), numbers(*tokens, width, dtype=dtype, seed=2)
    rows = (4, 5)
    factors = [
        (numbers(width, r, dtype=dtype, seed=3 + i), numbers(rows[i], r, dtype=dtype, seed=5 + i))
        for i, r in enumerate(ranks)
    ]
    return y, x, factors, [numbers(r, dtype=dtype, seed=7 + r) for r in rows] if bias else None, [1, 9]


def rules(n=4, b=3, e=2, rank=2, rule_rank=1, dtype=torch.float64):
    s, t = numbers(n, n, rule_rank, dtype=dtype, seed=1), numbers(n, n, rule_rank, dtype=dtype, seed=2)
    return s, t, numbers(n, b, rank, dtype=dtype, seed=3), numbers(n, e, rank, dtype=dtype, seed=4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [(2, 5), (7,), (2, 3, 1), (0, 4), ()])
def test_add_equals_the_reference_and_leaves_the_other_rows_alone(tokens, bias):
    arguments = problem(tokens=tokens, bias=bias)
    y = arguments[0].clone()
    out = lowrank.add(*arguments)
    torch.testing.assert_close(out, lowrank.add_ref(*arguments), rtol=1e-10, atol=1e-12)
    others = [0, 5, 6, 7, 8, 14]
    assert torch.equal(out[..., others].view(torch.int64), y[..., others].view(torch.int64))  # every bit
    assert torch.equal(arguments[0], y)


def test_a_negative_zero_of_the_other_rows_stays_one():
    y, x, factors, bias, first = problem()
    y[..., 0] = -0.0
    assert torch.signbit(lowrank.add(y, x, factors, bias, first)[..., 0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_error_is_at_most_twice_that_of_plain_torch(dtype):
    y, x, factors, bias, first = problem(dtype, tokens=(3, 17), width=33, out=20, ranks=(8, 5))
    wide = [t.double() for t in (y, x)], [(p.double(), q.double()) for p, q in factors], [b.double() for b in bias]
    true = lowrank.add_ref(*wide[0], wide[1], wide[2], first)
    plain = y.clone()
    for (p, q), b, f in zip(factors, bias, first, strict=True):
        plain[..., f : f + len(q)] += (x @ p) @ q.T + b
    ours = lowrank.add(y, x, factors, bias, first)
    assert ours.dtype == dtype
    assert (ours.double() - true).norm() <= 2 * (plain.double() - true).norm() + 1e-12


def test_strided_input_gives_the_same():
    y, x, factors, bias, first = problem()
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (y, x)]
    turned = [(p.T.contiguous().T, q.T.contiguous().T) for p, q in factors]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(lowrank.add(*strided, turned, bias, first), lowrank.add(y, x, factors, bias, first))


def flat(y, x, factors, bias, first):
    return y, x, torch.cat([p for p, _ in factors], 1), [q for _, q in factors], bias or [], first


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from inside opcheck
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_and_gradcheck(bias):
    y, x, p, q, b, first = flat(*problem(bias=bias))
    for t in (y, x, p, *q, *b):
        t.requires_grad_()
    op = torch.ops.leanvit.lowrank_add
    torch.library.opcheck(op.default, (y, x, p, q, b, first))

    def call(y, x, p, *rest):
        return op(y, x, p, list(rest[:2]), list(rest[2:]), first)

    assert torch.autograd.gradcheck(call, (y, x, p, *q, *b))
    assert torch.autograd.gradgradcheck(call, (y, x, p, *q, *b))


def test_only_the_gradients_that_are_asked_for():
    y, x, factors, bias, first = problem()
    factors[1][1].requires_grad_()
    lowrank.add(y, x, factors, bias, first).square().sum().backward()
    assert factors[1][1].grad is not None and x.grad is None and factors[0][0].grad is None
    frozen = lowrank.add(*problem())
    assert not frozen.requires_grad


def test_it_saves_the_input_and_the_narrow_product_alone():
    y, x, factors, bias, first = problem(torch.float32, tokens=(8, 64), width=64, out=192, ranks=(4, 4))
    factors = [(p.requires_grad_(), q.requires_grad_()) for p, q in factors]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lowrank.add(y, x, factors, bias, first)
    activations = sorted(t.numel() for t in saved if t.numel() >= 8 * 64 * 4)
    assert activations == [8 * 64 * 8, 8 * 64 * 64]


def test_compiles_without_a_graph_break():
    y, x, factors, bias, first = problem()
    factors = [(p.requires_grad_(), q.requires_grad_()) for p, q in factors]

    def step(y, x):
        return lowrank.add(2 * y, x, factors, bias, first).relu()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(y, x), step(y, x))
    wanted = torch.autograd.grad(step(y, x).sum(), [t for pair in factors for t in pair])
    got = torch.autograd.grad(compiled(y, x).sum(), [t for pair in factors for t in pair])
    torch.testing.assert_close(got, wanted)


def test_flop_formula():
    y, x, factors, bias, first = problem()
    with FlopCounterMode(display=False) as counter:
        lowrank.add(y, x, factors, bias, first)
    assert counter.get_total_flops() == 2 * 10 * (6 * (3 + 2) + 4 * 3 + 5 * 2)


def test_wrong_input_is_named():
    y, x, p, q, b, first = flat(*problem())
    op = torch.ops.leanvit.lowrank_add
    with pytest.raises(TypeError, match="one floating-point dtype is needed, got float32, float64"):
        op(y, x.float(), p, q, b, first)
    with pytest.raises(ValueError, match=r"do not fit: \(2, 5, 15\), \(2, 5, 5\), \(6, 5\)"):
        op(y, x[..., :5], p, q, b, first)
    with pytest.raises(ValueError, match=r"do not fit p with 4 columns"):
        op(y, x, p[:, :4], q, b, first)
    for bad in ([1, 3], [1, 11], [-1, 9]):
        with pytest.raises(ValueError, match="overlap others or leave the 15 rows of y"):
            op(y, x, p, q, b, bad)
    with pytest.raises(ValueError, match="biases of .* do not fit the rows"):
        op(y, x, p, q, b[::-1], first)


# --- sums of Kronecker products --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "b", "e", "rank", "rule_rank"), [(4, 3, 2, 1, 1), (3, 2, 5, 2, 2), (1, 4, 4, 1, 1)])
def test_kronecker_forms_agree(n, b, e, rank, rule_rank):
    """T5 and T6: torch.kron, the index formula, the thin product and the three products."""
    s, t, u, v = rules(n, b, e, rank, rule_rank)
    a = s @ t.mT
    h = lowrank.kronecker_sum_ref(a, u, v)
    assert h.shape == (n * b, n * e)
    inner = u @ v.mT
    for i, j, k, m in ((0, 0, 0, 0), (n - 1, b - 1, n - 1, e - 1), (n // 2, 1, 0, e - 1)):
        torch.testing.assert_close(h[i * b + j, k * e + m], (a[:, i, k] * inner[:, j, m]).sum())
    torch.testing.assert_close(lowrank.kronecker_sum(a, u, v), h, rtol=1e-10, atol=1e-12)
    p, q = lowrank.factors(s, t, u, v)
    assert p.shape == (n * b, n * rule_rank * rank) and q.shape == (n * e, n * rule_rank * rank)
    torch.testing.assert_close(p @ q.T, h, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(p[b - 1, 0], s[0, 0, 0] * u[0, b - 1, 0])
    for tokens in ((2, 5), (7,), (2, 3, 1), (0, 4), ()):
        x = numbers(*tokens, n * b, seed=9)
        torch.testing.assert_close(lowrank.kronecker_apply(x, a, u, v), x @ h, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close((x @ p) @ q.T, x @ h, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            lowrank.kronecker_apply(x.float(), a.float(), u.float(), v.float()), (x @ h).float(), rtol=1e-5, atol=1e-5
        )


def test_kronecker_gradients():
    s, t, u, v = rules()
    x = numbers(3, 12, seed=9)
    inputs = [value.requires_grad_() for value in (x, s @ t.mT, u, v)]
    assert torch.autograd.gradcheck(lowrank.kronecker_apply, inputs)
    wanted = torch.autograd.grad((x @ lowrank.kronecker_sum_ref(*inputs[1:])).square().sum(), inputs)
    got = torch.autograd.grad(lowrank.kronecker_apply(*inputs).square().sum(), inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_kronecker_apply_builds_nothing_of_the_size_of_h():
    n, k, tokens = 32, 256, 8
    s, t, u, v = (value.float() for value in rules(n, k // n, k // n, 1))
    x = numbers(tokens, k, dtype=torch.float32).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        lowrank.kronecker_apply(x, s @ t.mT, u, v)
    # u, A and v products, and the A_i themselves; x H alone would be 2 * tokens * k^2
    assert counter.get_total_flops() == 2 * tokens * (2 * k * n + n**3) + 2 * n**3


def test_adding_into_an_output_is_the_op_without_its_copy():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(12, 6, dtype=torch.float64)
    p = [torch.randn(6, 3, dtype=torch.float64, requires_grad=True) for _ in "qv"]
    q = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in "qv"]
    b = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in "qv"]
    wanted = (x, *p, *q, *b)
    for bias in (b, None):
        results = []
        for into in (False, True):
            y = torch.nn.functional.linear(x, weight)
            out = lowrank.add(y, x, list(zip(p, q, strict=True)), bias, [0, 8], into=into)
            assert (out.data_ptr() == y.data_ptr()) == into
            grads = torch.autograd.grad(out.square().sum(), wanted, allow_unused=True)
            results.append((out, *[g for g in grads if g is not None]))
        assert len(results[0]) == 1 + len(wanted) - 2 * (bias is None)
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    leaf = torch.zeros(2, 5, 12, dtype=torch.float64, requires_grad=True)
    assert lowrank.add(leaf, x, [(p[0], q[0])], None, [0], into=True).data_ptr() != leaf.data_ptr()
    view = torch.zeros(2, 6, 12, dtype=torch.float64)[:1]
    assert lowrank.add(view, torch.zeros(1, 6, 6).double(), [(p[0], q[0])], None, [0], into=True) is not view


def test_factors_differentiate():
    torch.manual_seed(0)
    shapes = ((4, 4, 2), (4, 4, 2), (4, 3, 2), (4, 5, 2))
    s, t, u, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(lowrank.factors, (s, t, u, v))


def frozen_layer(out=15, width=6, dtype=torch.float64, bias=True):
    layer = torch.nn.Linear(width, out, bias=bias, dtype=dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(numbers(*parameter.shape, dtype=dtype, seed=20 + seed))
    return layer.requires_grad_(False)


def learning(*arguments):
    return [a.clone().requires_grad_() for a in arguments]


def trained(layer, x, factors, biases, first):
    """The output of `lowrank.linear`, and x and the factors one by one, which learn."""
    flat = learning(x, *(t for pair in factors for t in pair))
    return lowrank.linear(layer, flat[0], [(flat[1], flat[2]), (flat[3], flat[4])], biases, first), flat


@pytest.mark.parametrize("tokens", [(2, 5), (7,), ()])
@pytest.mark.parametrize("bias, own", [(True, True), (False, True), (True, False)])
def test_a_frozen_layer_and_what_is_added_are_the_two_apart(tokens, bias, own):
    layer, (_, x, factors, biases, first) = frozen_layer(bias=own), problem(tokens=tokens, bias=bias)
    found = []
    for run in (lowrank.linear, lambda layer, x, *rest: lowrank.add_ref(layer(x), x, *rest)):
        flat = learning(x, *(t for pair in factors for t in pair), *(biases or []))
        pairs = [(flat[1], flat[2]), (flat[3], flat[4])]
        y = run(layer, flat[0], pairs, flat[5:] or None, first)
        found.append((y, *torch.autograd.grad(y, flat, numbers(*y.shape, seed=40))))
    for ours, true in zip(*found, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-11)
    others = [0, 5, 6, 7, 8, 14]
    assert torch.equal(found[0][0][..., others].view(torch.int64), layer(x)[..., others].view(torch.int64))


def test_a_large_frozen_layer_in_float32(monkeypatch):
    taken, ask = [], products._product
    monkeypatch.setattr(products, "_product", lambda a, b: (taken.append(a.shape), ask(a, b))[1])
    layer, x = frozen_layer(1152, 384, torch.float32), numbers(2, 197, 384, dtype=torch.float32, seed=1)
    pairs = [[numbers(384, 32, dtype=torch.float32, seed=s) for s in (2 * i, 2 * i + 1)] for i in (1, 2)]
    found = []
    for kind, run in ((torch.float32, lowrank.linear), (torch.float64, None)):
        flat = learning(*(t.to(kind) for t in (x, *pairs[0], *pairs[1])))
        arguments = flat[0], [(flat[1], flat[2]), (flat[3], flat[4])], None, [0, 768]
        y = run(layer, *arguments) if run else lowrank.add_ref(layer.to(kind)(flat[0]), *arguments)
        found.append((y, *torch.autograd.grad(y, flat, numbers(*y.shape, dtype=kind, seed=9))))
    for ours, true in zip(*found, strict=True):
        assert (ours - true).norm() <= 2e-6 * true.norm()
    assert taken == ([(394, 1152)] if products._ONEDNN is not None else [])


def fused(y):
    return type(y.grad_fn).__name__ == "_FrozenLinearBackward"


def of_own_class(called):
    class Own(torch.nn.Linear):
        def forward(self, x):
            called.append("forward")
            return super().forward(x)

    return Own(6, 15, dtype=torch.float64).requires_grad_(False)


def with_own_forward(called):
    layer = frozen_layer()
    layer.forward = lambda x: (called.append("forward"), torch.nn.Linear.forward(layer, x))[1]
    return layer


def hooked(register):
    def made(called):
        layer = frozen_layer()
        getattr(layer, register)(lambda *_: called.append("hook"))
        return layer

    return made


def compiled(called):
    layer = frozen_layer()
    layer.compile(backend="eager")
    run = layer._compiled_call_impl
    layer._compiled_call_impl = lambda *x: (called.append("compiled"), run(*x))[1]
    return layer


MORE = {
    "class": of_own_class,
    "forward": with_own_forward,
    "forward hook": hooked("register_forward_hook"),
    "forward pre-hook": hooked("register_forward_pre_hook"),
    "backward hook": hooked("register_full_backward_hook"),
    "backward pre-hook": hooked("register_full_backward_pre_hook"),
    "compiled": compiled,
}


@pytest.mark.parametrize("kind", MORE)
def test_layers_that_are_more_than_their_weight_are_called_as_modules(kind):
    _, x, factors, biases, first = problem()
    called = []
    layer = MORE[kind](called)
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    y, flat = trained(layer, x, factors, biases, first)
    torch.testing.assert_close(y, lowrank.add_ref(plain, x, factors, biases, first))
    assert not fused(y)
    y.sum().backward()
    assert called


def test_global_hooks_see_the_layer():
    layer, (_, x, factors, biases, first) = frozen_layer(), problem()
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        lowrank.linear(layer, x, factors, biases, first)
    finally:
        handle.remove()
    assert seen == [layer]


@pytest.mark.parametrize("learns", ["weight", "bias", "a computed weight"])
def test_whatever_of_a_layer_learns_gets_its_gradient(learns):
    layer, (_, x, factors, biases, first) = frozen_layer(), problem()
    if learns == "a computed weight":
        source = torch.ones((), dtype=torch.float64, requires_grad=True)
        weight = layer.weight.detach() * source
        del layer.weight
        layer.weight = weight
    else:
        source = getattr(layer, learns).requires_grad_()
    y = lowrank.linear(layer, x, factors, biases, first)
    assert not fused(y)
    y.square().sum().backward()
    assert source.grad.abs().sum() > 0


def test_a_frozen_layer_runs_as_one_and_its_output_may_be_changed_in_place():
    layer, (_, x, factors, biases, first) = frozen_layer(), problem()
    y, flat = trained(layer, x, factors, biases, first)
    assert fused(y)
    y += 1
    y.square().sum().backward()
    assert all(t.grad.abs().sum() > 0 for t in flat)


def test_the_weight_is_kept_only_for_an_input_that_learns():
    _, x, factors, biases, first = problem()
    kept = []
    for learns in (False, True):
        layer, p = frozen_layer(), factors[0][0].clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):
            own = x.clone().requires_grad_(learns)
            y = lowrank.linear(layer, own, [(p, factors[0][1]), factors[1]], biases, first)
        assert fused(y) and (layer.weight.data_ptr() in kept) == learns


def test_a_frozen_layer_on_the_meta_device():
    layer, (_, x, factors, biases, first) = frozen_layer().to("meta"), problem()
    factors, biases = [(p.to("meta"), q.to("meta")) for p, q in factors], [b.to("meta") for b in biases]
    assert lowrank.linear(layer, x.to("meta"), factors, biases, first).shape == (2, 5, 15)


def test_batched_gradients_of_a_frozen_layer():
    layer, (_, x, factors, biases, first) = frozen_layer(), problem()
    own = x.clone().requires_grad_()
    y = lowrank.linear(layer, own, factors, biases, first)
    g = numbers(3, *y.shape, seed=50)
    found = torch.autograd.grad(y, own, g, is_grads_batched=True, retain_graph=True)[0]
    for one, ours in zip(g, found, strict=True):
        torch.testing.assert_close(torch.autograd.grad(y, own, one, retain_graph=True)[0], ours)


def test_a_frozen_layer_under_autocast_adds_in_the_dtype_of_its_output():
    layer, (_, x, factors, biases, first) = frozen_layer(dtype=torch.float32), problem(torch.float32)
    own = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = lowrank.linear(layer, own, factors, biases, first)
        assert y.dtype == layer(x).dtype == torch.bfloat16 and not fused(y)


def test_the_backward_of_a_frozen_layer_keeps_its_dtype_under_autocast():
    layer, (_, x, factors, biases, first) = frozen_layer(dtype=torch.float32), problem(torch.float32)
    gradients = []
    for on in (False, True):
        y, flat = trained(layer, x, factors, biases, first)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            gradients.append(torch.autograd.grad(y, flat, torch.ones_like(y)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_flops_of_a_frozen_layer_are_those_of_its_products():
    layer, (_, x, factors, biases, first) = frozen_layer(), problem()
    flat = learning(x, *(t for pair in factors for t in pair))
    with FlopCounterMode(display=False) as counter:
        y = lowrank.linear(layer, flat[0], [(flat[1], flat[2]), (flat[3], flat[4])], biases, first)
        thin = 2 * 10 * 6 * 5 + 2 * 10 * (4 * 3 + 5 * 2)  # x P of rank 3 + 2, then 4 and 5 rows
        assert counter.get_total_flops() == 2 * 10 * 6 * 15 + thin
        y.sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 10 * 6 * 15) + 3 * thin
