
# Whole training steps of networks: forward with loss, backward, AdamW.


def read(path, shapes):
    """Tensors of f32 that follow each other in a file."""
    import numpy

    flat = torch.from_numpy(numpy.fromfile(path, dtype=numpy.float32))
    tensors = {}
    for name, shape in shapes:
        size = 1
        for n in shape:
            size *= n
        tensors[name], flat = flat[:size].view(shape).clone(), flat[size:]
    return tensors


def network(name, make, loss):
    """A network whose parameters have the names that the request gives."""

    def prepare(spec):
        import numpy

        before = resident("VmRSS:")
        data = read(spec["file"], spec["tensors"])
        model = make(spec)
        own = dict(model.named_parameters())
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(data[key])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

        def run():
            times = [time.perf_counter()]
            value = loss(model, data)
            times.append(time.perf_counter())
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            times.append(time.perf_counter())
            optimizer.step()
            times.append(time.perf_counter())
            parts = [b - a for a, b in zip(times, times[1:])]
            return parts + [times[-1] - times[0]]

        if spec.get("memory"):

            def first():
                run()
                return [resident("VmHWM:") - before]

            return first
        value = loss(model, data)
        value.backward()
        names = [key for key, _ in spec["tensors"] if key in own]
        grads = [own[key].grad.reshape(-1).numpy() for key in names]
        numpy.concatenate(grads).tofile(spec["gradients"])
        return run

    operation(name)(prepare)


def resident(key):
    """Bytes of this process's memory, now or at most."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(key))
    return 1024 * int(line.split()[1])


def classify(model, data):
    labels = data["labels"].long()
    return torch.nn.functional.cross_entropy(model(data["input"]), labels)


class Layers(torch.nn.Module):
    """Modules under dotted names, as ours are called."""

    def __init__(self, **modules):
        super().__init__()
        for key, value in modules.items():
            setattr(self, key, value)


def unit(inputs, outputs, kernel=3, stride=1, norm=True):
    conv = torch.nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=not norm)
    if norm:
        return Layers(conv=conv, norm=torch.nn.BatchNorm2d(outputs))
    return Layers(conv=conv)


class Mlp(torch.nn.Module):
    def __init__(self, spec):
        super().__init__()
        widths = spec["widths"]
        pairs = zip(widths, widths[1:])
        self.layers = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in pairs)

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)


class ConvNet(torch.nn.Module):
    def __init__(self, spec):
        super().__init__()
        widths = spec["widths"]
        pairs = zip(widths, widths[1:])
        self.units = torch.nn.ModuleList(unit(a, b, norm=False) for a, b in pairs)
        self.head = torch.nn.Linear(widths[-1], 10)

    def forward(self, x):
        for i, layer in enumerate(self.units):
            x = torch.relu(layer.conv(x))
            if i + 1 < len(self.units):
                x = torch.nn.functional.max_pool2d(x, 2)
        return self.head(x.mean((2, 3)))


class ResBlock(torch.nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.first = unit(inputs, outputs, 3, stride)
        self.second = unit(outputs, outputs)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = unit(inputs, outputs, 1, stride)

    def forward(self, x):
        y = torch.relu(self.first.norm(self.first.conv(x)))
        y = self.second.norm(self.second.conv(y))
        if self.shortcut is not None:
            x = self.shortcut.norm(self.shortcut.conv(x))
        return torch.relu(y + x)


class ResNet(torch.nn.Module):
    def __init__(self, spec):
        super().__init__()
        width, blocks = spec["width"], spec["blocks"]
        self.stem = unit(3, width)
        self.stages = torch.nn.ModuleList()
        inputs = width
        for stage in range(3):
            outputs = width << stage
            layers = torch.nn.ModuleList()
            for i in range(blocks):
                layers.append(ResBlock(inputs, outputs, 2 if stage and not i else 1))
                inputs = outputs
            self.stages.append(layers)
        self.head = torch.nn.Linear(inputs, 10)

    def forward(self, x):
        x = torch.relu(self.stem.norm(self.stem.conv(x)))
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(x.mean((2, 3)))


class Block(torch.nn.Module):
    def __init__(self, dim, heads, hidden):
        super().__init__()
        make = lambda: torch.nn.Linear(dim, dim)
        self.attention = Layers(query=make(), key=make(), value=make(), output=make())
        self.attention_norm = torch.nn.LayerNorm(dim)
        self.feed_forward_norm = torch.nn.LayerNorm(dim)
        self.inner = torch.nn.Linear(dim, hidden)
        self.outer = torch.nn.Linear(hidden, dim)
        self.heads = heads

    def forward(self, x):
        batch, time, dim = x.shape
        a, h = self.attention, self.attention_norm(x)
        split = lambda t: t.view(batch, time, self.heads, -1).transpose(1, 2)
        q, k, v = split(a.query(h)), split(a.key(h)), split(a.value(h))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + a.output(mixed.transpose(1, 2).reshape(batch, time, dim))
        h = self.inner(self.feed_forward_norm(x))
        return x + self.outer(torch.nn.functional.gelu(h))


class TransformerLm(torch.nn.Module):
    def __init__(self, spec):
        super().__init__()
        dim, vocabulary = spec["dim"], spec["vocabulary"]
        self.tokens = torch.nn.Parameter(torch.empty(vocabulary, dim))
        self.positions = torch.nn.Parameter(torch.empty(spec["time"], dim))
        make = lambda: Block(dim, spec["heads"], spec["hidden"])
        self.blocks = torch.nn.ModuleList(make() for _ in range(spec["layers"]))
        self.norm = torch.nn.LayerNorm(dim)
        self.head = torch.nn.Linear(dim, vocabulary)

    def forward(self, tokens):
        x = torch.nn.functional.embedding(tokens, self.tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def next_token(model, data):
    logits = model(data["input"].long())
    labels = data["labels"].long().reshape(-1)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels)


network("torch mlp", Mlp, classify)
network("torch cnn", ConvNet, classify)
network("torch resnet", ResNet, classify)
network("torch transformer", TransformerLm, next_token)


class UNetBlock(torch.nn.Module):
    def __init__(self, inputs, outputs, groups, width):
        super().__init__()
        conv = lambda a, b, k: torch.nn.Conv2d(a, b, k, padding=k // 2)
        self.first_norm = torch.nn.GroupNorm(groups, inputs)
        self.first = conv(inputs, outputs, 3)
        self.embedding = torch.nn.Linear(width, outputs)
        self.second_norm = torch.nn.GroupNorm(groups, outputs)
        self.second = conv(outputs, outputs, 3)
        self.shortcut = conv(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x, embedding):
        silu = torch.nn.functional.silu
        h = self.first(silu(self.first_norm(x)))
        h = h + self.embedding(embedding)[:, :, None, None]
        h = self.second(silu(self.second_norm(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class UNet(torch.nn.Module):
    def __init__(self, spec):
        super().__init__()
        c, groups, width = spec["channels"], spec["groups"], spec["embedding"]
        conv = lambda a, b, s=1: torch.nn.Conv2d(a, b, 3, s, 1)
        block = lambda a, b: UNetBlock(a, b, groups, width)
        pairs = list(zip(c, c[1:]))
        make = torch.nn.ModuleList
        self.level = make(torch.nn.Linear(width, width) for _ in range(2))
        self.stem = conv(1, c[0])
        self.down = make(block(a, b) for a, b in zip([c[0]] + c, c))
        self.shrink = make(conv(a, a, 2) for a, _ in pairs)
        self.middle = block(c[-1], c[-1])
        self.grow = make(conv(b, a) for a, b in pairs)
        self.up = make(block(2 * a, a) for a, _ in pairs)
        self.norm = torch.nn.GroupNorm(groups, c[0])
        self.head = conv(c[0], 1)
        half = width // 2
        self.frequencies = 10_000.0 ** (-torch.arange(half) / half)

    def forward(self, x, level):
        silu = torch.nn.functional.silu
        angles = 1000 * level[:, None] * self.frequencies
        features = torch.cat([angles.sin(), angles.cos()], 1)
        embedding = silu(self.level[1](silu(self.level[0](features))))
        h, beside = self.stem(x), []
        for i, block in enumerate(self.down):
            h = block(h, embedding)
            if i < len(self.shrink):
                beside.append(h)
                h = self.shrink[i](h)
        h = self.middle(h, embedding)
        for i in reversed(range(len(self.up))):
            skip = beside[i]
            large = torch.nn.functional.interpolate(h, skip.shape[2:], mode="nearest")
            h = self.up[i](torch.cat([self.grow[i](large), skip], 1), embedding)
        return self.head(silu(self.norm(h)))


def denoise(model, data):
    difference = model(data["input"], data["level"]) - data["target"]
    return difference.square().mean()


network("torch unet", UNet, denoise)
