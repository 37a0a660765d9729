# Forward and backward of layers and losses.


def layer(name, make):
    """Forward and backward of a layer, from the gradient c of its output."""

    def prepare(spec):
        generator = torch.Generator().manual_seed(0)
        shape = spec["shape"]
        x = torch.randn(shape, generator=generator).requires_grad_()
        c = torch.randn(shape, generator=generator)
        module = make(shape)

        def run():
            x.grad = None
            module.zero_grad(set_to_none=True)
            module(x).backward(c)

        return run

    operation(name)(prepare)


layer("BatchNorm1d", lambda shape: torch.nn.BatchNorm1d(shape[1]))
layer("BatchNorm2d", lambda shape: torch.nn.BatchNorm2d(shape[1]))
layer("LayerNorm", lambda shape: torch.nn.LayerNorm(shape[-1]))
layer("RMSNorm", lambda shape: torch.nn.RMSNorm(shape[-1], eps=1e-5))


@operation("cross_entropy")
def cross_entropy(spec):
    generator = torch.Generator().manual_seed(0)
    rows, classes = spec["shape"]
    logits = torch.randn(rows, classes, generator=generator).requires_grad_()
    labels = torch.randint(classes, (rows,), generator=generator)

    def run():
        logits.grad = None
        torch.nn.functional.cross_entropy(logits, labels).backward()

    return run
