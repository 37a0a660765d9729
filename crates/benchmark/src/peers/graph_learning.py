# Products along edges, and fixed points on graphs.


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
    x = torch.randn(n, spec["width"], generator=generator).requires_grad_()

    def run():
        x.grad = None
        (matrix @ x).sum().backward()

    return run


@operation("gather and index_add")
def gather_add(spec):
    generator, src, dst = edges_of(spec)
    n, width = spec["nodes"], spec["width"]
    weights = torch.rand(spec["edges"], 1, generator=generator)
    x = torch.randn(n, width, generator=generator).requires_grad_()

    def run():
        x.grad = None
        messages = weights * x.index_select(0, src)
        torch.zeros(n, width).index_add(0, dst, messages).sum().backward()

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
        return gamma * (y[:, src, 0] * h[:, dst, 0]), y

    return run
