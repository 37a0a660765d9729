# Products along edges, epochs of networks, sampling, and fixed points on graphs.


def edges_of(spec):
    generator = torch.Generator().manual_seed(0)
    n, count = spec["nodes"], spec["edges"]
    src = torch.randint(n, (count,), generator=generator)
    dst = torch.randint(n, (count,), generator=generator)
    return generator, src, dst


@operation("torch.sparse CSR")
def sparse_csr(spec):
    generator, src, dst = edges_of(spec)
    n = spec["nodes"]
    weights = torch.rand(spec["edges"], generator=generator)
    matrix = torch.sparse_coo_tensor(torch.stack([dst, src]), weights, (n, n))
    matrix = matrix.coalesce().to_sparse_csr()
    x = torch.randn(n, spec["width"], generator=generator).requires_grad_(spec["gradient"])

    def run():
        x.grad = None
        y = matrix @ x
        if spec["gradient"]:
            y.sum().backward()

    return run


@operation("gather and index_add")
def gather_add(spec):
    generator, src, dst = edges_of(spec)
    n, width = spec["nodes"], spec["width"]
    weights = torch.rand(spec["edges"], 1, generator=generator)
    x = torch.randn(n, width, generator=generator).requires_grad_(spec["gradient"])

    def run():
        x.grad = None
        messages = weights * x.index_select(0, src)
        y = torch.zeros(n, width).index_add(0, dst, messages)
        if spec["gradient"]:
            y.sum().backward()

    return run


@operation("torch.bmm loop")
def bmm_loop(spec):
    generator, src, dst = edges_of(spec)
    n, heads, iterations = spec["nodes"], spec["heads"], spec["iterations"]
    weights = 0.1 * torch.rand(heads, spec["edges"], generator=generator)
    bias = torch.randn(heads, n, 1, generator=generator)
    gamma = 0.9

    def run():
        dense = torch.zeros(heads, n, n)
        dense[:, src, dst] = weights
        h = torch.zeros(heads, n, 1)
        for _ in range(iterations + 1):
            h = gamma * torch.bmm(dense, h) + bias
        grad = torch.ones(heads, n, 1)
        back = dense.transpose(1, 2)
        y = torch.zeros(heads, n, 1)
        for _ in range(iterations + 1):
            y = gamma * torch.bmm(back, y) + grad
        gamma * (y[:, src, 0] * h[:, dst, 0])

    return run


@operation("torch.sparse loop")
def sparse_loop(spec):
    generator, src, dst = edges_of(spec)
    n, heads, iterations = spec["nodes"], spec["heads"], spec["iterations"]
    weights = 0.1 * torch.rand(heads, spec["edges"], generator=generator)
    bias = torch.randn(heads * n, 1, generator=generator)
    gamma = 0.9
    # The heads' matrices on one diagonal.
    first = n * torch.arange(heads)[:, None]
    rows, cols = (first + src).flatten(), (first + dst).flatten()

    def csr(rows, cols):
        size = (heads * n, heads * n)
        matrix = torch.sparse_coo_tensor(torch.stack([rows, cols]), weights.flatten(), size)
        return matrix.coalesce().to_sparse_csr()

    # Made once: only the iterations are timed.
    forth, back = csr(rows, cols), csr(cols, rows)

    def run():
        h = torch.zeros(heads * n, 1)
        for _ in range(iterations + 1):
            h = gamma * (forth @ h) + bias
        grad = torch.ones(heads * n, 1)
        y = torch.zeros(heads * n, 1)
        for _ in range(iterations + 1):
            y = gamma * (back @ y) + grad
        gamma * (y[rows, 0] * h[cols, 0])

    return run


def pyg_model(spec, kind):
    from torch_geometric.nn import GATConv, GCNConv, SAGEConv

    torch.manual_seed(0)
    _, src, dst = edges_of(spec)
    n, inputs, hidden, classes = (spec[k] for k in ("nodes", "inputs", "hidden", "classes"))
    if kind == "gat":
        layers = [GATConv(inputs, hidden // 8, heads=8), GATConv(hidden, classes)]
    else:
        conv = {"gcn": lambda a, b: GCNConv(a, b, cached=True), "sage": SAGEConv}[kind]
        layers = [conv(inputs, hidden), conv(hidden, classes)]
    model = torch.nn.ModuleList(layers)
    adam = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4, fused=True)
    edges = torch.stack([src, dst])
    x = torch.randn(n, inputs)
    y = torch.randint(classes, (n,))

    def run():
        adam.zero_grad(set_to_none=True)
        h = model[0](x, edges).relu()
        torch.nn.functional.cross_entropy(model[1](h, edges), y).backward()
        adam.step()

    return run


@operation("PyTorch Geometric GCN")
def pyg_gcn(spec):
    return pyg_model(spec, "gcn")


@operation("PyTorch Geometric SAGE")
def pyg_sage(spec):
    return pyg_model(spec, "sage")


@operation("PyTorch Geometric GAT")
def pyg_gat(spec):
    return pyg_model(spec, "gat")


@operation("NumPy neighbor sampling")
def numpy_sampling(spec):
    import numpy as np

    _, src, dst = edges_of(spec)
    src, dst = src.numpy(), dst.numpy()
    order = np.argsort(dst, kind="stable")
    sources = src[order]
    indptr = np.concatenate([[0], np.cumsum(np.bincount(dst, minlength=spec["nodes"]))])
    rng = np.random.default_rng(0)
    seeds, fanouts = spec["seeds"], spec["fanouts"]

    def run():
        known = rng.choice(spec["nodes"], seeds, replace=False)
        for fanout in fanouts:
            counts = indptr[known + 1] - indptr[known]
            total = counts.sum()
            row = np.repeat(np.arange(len(known)), counts)
            first = np.repeat(np.cumsum(counts) - counts, counts)
            at = np.repeat(indptr[known], counts) + np.arange(total) - first
            # The smallest of random keys in each row: a draw without replacement.
            ranked = np.lexsort((rng.random(total), row))
            keep = ranked[np.arange(total) - first < fanout]
            drawn = sources[at[keep]]
            known = np.concatenate([known, np.setdiff1d(drawn, known)])
        return len(known)

    return run


@operation("POT gromov_wasserstein2")
def pot_gromov(spec):
    import numpy as np
    import ot

    n = spec["nodes"]
    a, b = (np.array(spec[name]).reshape(n, n) for name in ("a", "b"))

    def run():
        ot.gromov.gromov_wasserstein2(a, b, loss_fun="square_loss")

    return run
