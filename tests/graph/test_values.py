"""The functional view: spellings fold into one op, writes make new values, aliases of a written tensor turn opaque."""

import operator

import pytest
import torch
import torch.nn.functional as F

from samoyeds_compile.graph.values import read_values


def view_of(function, *inputs):
    """The view of what Dynamo captures of ``function``."""
    captured = []

    def backend(gm, example_inputs):
        captured.append(read_values(gm))
        return gm.forward

    torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    return captured[0]


x, y = torch.randn(3, 4), torch.randn(3, 4)
index = torch.tensor([2, 0])


@pytest.mark.parametrize(
    ("op", "spellings"),
    [
        ("add", [lambda a, b: a + b, torch.add, lambda a, b: a.add(b), lambda a, b: torch.ops.aten.add.Tensor(a, b)]),
        ("mul", [lambda a, b: a * b, torch.mul, torch.multiply, lambda a, b: a.mul(b)]),
        ("div", [lambda a, b: a / b, torch.true_divide, lambda a, b: a.divide(b)]),
        ("silu", [lambda a, b: F.silu(a), lambda a, b: torch.ops.aten.silu(a)]),
        ("to", [lambda a, b: a.to(torch.float64), lambda a, b: a.double(), lambda a, b: a.to(dtype=torch.float64),
                lambda a, b: a.type(torch.float64)]),
        ("transpose", [lambda a, b: a.transpose(0, 1), lambda a, b: torch.transpose(a, 0, 1), lambda a, b: a.mT]),
        ("index", [lambda a, b: a[index], lambda a, b: a[(index,)]]),
        ("slice", [lambda a, b: a[..., :2], lambda a, b: a[:, ::2]]),
        ("softmax", [lambda a, b: a.softmax(-1), lambda a, b: F.softmax(a, dim=-1), torch.softmax]),
        ("view", [lambda a, b: a.view(-1), lambda a, b: a.view((12,))]),
        ("unsqueeze", [lambda a, b: a.unsqueeze(-1), lambda a, b: torch.unsqueeze(a, -1)]),
    ],
)  # fmt: skip
def test_one_name_for_all_spellings(op, spellings):
    for spelling in spellings:
        arguments = (x, -1) if spelling is torch.softmax else (x, y)
        graph = view_of(spelling, *arguments)
        assert [v.op for v in graph.values if v.op not in ("placeholder", "output")] == [op]


def test_arguments_have_names():
    graph = view_of(lambda a: torch.topk(a, 2, -1, sorted=False)[0].sum(1, keepdim=True).view(3, 1), x)
    topk, total, view = graph.with_op("topk")[0], graph.with_op("sum")[0], graph.with_op("view")[0]
    assert (topk.arg("k"), topk.arg("dim"), topk.arg("sorted")) == (2, -1, False)
    assert (total.arg("dim"), total.arg("keepdim")) == (1, True)
    assert view.arg("shape") == (3, 1)


@pytest.mark.parametrize("write", [lambda a, b: a.add_(b), torch.Tensor.add_, operator.iadd])
def test_a_write_makes_a_new_value(write):
    def function(a, b):
        c = a * 2
        write(c, b)
        return c.exp()

    graph = view_of(function, x, y)
    (exp,) = graph.with_op("exp")
    assert exp.input.op == "add"
    assert exp.input.input.op == "mul"
    assert not exp.input.writes_input


def test_setitem_is_a_write():
    def function(a):
        c = torch.empty_like(a)
        c[index] = a[index]
        return c + 1

    graph = view_of(function, x)
    (add,) = graph.with_op("add")
    assert add.input.op == "index_put"


def test_a_read_before_the_write_means_the_old_value():
    def function(a, b):
        c = a * 2
        before = c.exp()
        c.add_(b)
        return before + c

    graph = view_of(function, x, y)
    (exp,) = graph.with_op("exp")
    assert exp.input.op == "mul"
    assert exp.input.superseded is not None


def test_an_alias_of_a_written_tensor_is_opaque():
    def function(a, b):
        c = a * 2
        half = c[:, :2]
        c.add_(b)
        return half.exp()

    graph = view_of(function, x, y)
    (exp,) = graph.with_op("exp")
    assert exp.input.op == "aliased_write"


def test_results_of_a_sort_do_not_alias_but_chunks_do():
    def function(a):
        values, order = torch.sort(a)
        values.clamp_(max=0)
        left, right = (a * 2).chunk(2, -1)
        left.add_(1)
        return order + 1, right + 1

    graph = view_of(function, x)
    order_add, right_add = graph.with_op("add")[-2:]
    assert order_add.input.op == "item"
    assert right_add.input.op == "aliased_write"


def test_a_write_to_an_input_is_a_side_effect():
    graph = view_of(lambda a, b: a.mul_(2) + b, x.clone(), y)
    (mul,) = graph.with_op("mul")
    assert mul.writes_input


def test_users_are_in_order_and_complete():
    graph = view_of(lambda a: (a.exp() + 1, a.sin()), x)
    (placeholder,) = graph.with_op("placeholder")
    assert [u.op for u in placeholder.users] == ["exp", "sin"]


def test_an_alias_reads_every_write_since_it_was_last_read():
    def function(a, b):
        c = a * 2
        flat = c.view(-1)
        c.add_(b)
        before = flat.exp()
        c.mul_(b)
        c.sub_(b)
        return before, flat.sin(), flat.cos()

    graph = view_of(function, x, y)
    (view,), (exp,), (sin,), (cos,) = (graph.with_op(name) for name in ("view", "exp", "sin", "cos"))
    add, mul, sub = graph.with_op("add", "mul", "sub")[-3:]
    assert [v.op for v in exp.input.operands] == ["view", "add"]
    assert sin.input is cos.input
    assert sin.input.operands == [exp.input, mul, sub]
    assert all(sin.input in write.users for write in (mul, sub))
    assert (view.superseded, exp.input.superseded) == (add.position, mul.position)
    assert sin.input.superseded is None


def test_a_value_is_superseded_by_the_next_write_whether_or_not_it_is_read_again():
    def function(a, b):
        c = a * 2
        half = c[:, :2]
        result = half.exp()
        c.add_(b)
        c.mul_(b)
        return result

    graph = view_of(function, x, y)
    (half,), (add,), (first, last) = (graph.with_op(name) for name in ("slice", "add", "mul"))
    assert half.superseded == first.superseded == add.position
    assert (add.superseded, last.superseded) == (last.position, None)


def add_by_index(out, rows):
    for e in range(len(rows)):
        out.index_add_(0, index, rows[e].sin())


def add_to_rows(out, rows):
    for e in range(len(rows)):
        out[e].add_(rows[e].sum(0))


def add_to_items(out, rows):
    for e in range(len(rows)):
        out[e] += rows[e].sum(0)


def add_to_parts(out, rows):
    for part, row in zip(out.unbind(0), rows.unbind(0), strict=True):
        part.add_(row.sum(0))


@pytest.mark.parametrize("write", [add_by_index, add_to_rows, add_to_items, add_to_parts])
def test_the_number_of_values_is_linear_in_the_number_of_writes(write):
    def function(rows):
        out = rows.new_zeros(len(rows), 4)
        write(out, rows)
        return out + 1

    few, more, most = (len(view_of(function, torch.randn(size, 2, 4)).values) for size in (4, 8, 16))
    assert most - more == 2 * (more - few)
