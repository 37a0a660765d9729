"""Runs one operation of a Python package at a time, on demand, and answers with its time.

Reads JSON objects from standard input, a line each: {"set": NAME, ...} prepares an operation,
{"run": true} runs it once, {"end": true} forgets it. Every line is answered by one JSON line.
"""
import gc
import json
import sys
import time

import torch


def parameters(spec):
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in spec["shapes"]:
        p = torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.02)
        p.grad = torch.randn(shape, generator=generator) * 0.001
        params.append(p)
    return params


def optimizer(make):
    def prepare(spec):
        params = parameters(spec)
        opt = make(params)
        return opt.step

    return prepare


def lion(params):
    from lion_pytorch import Lion

    return Lion(params, lr=1e-4, weight_decay=0.0)


def spam(params):
    from pytorch_optimizer import SPAM

    return SPAM(params, lr=1e-3, density=1.0)


def ortho_grad(params):
    from pytorch_optimizer import OrthoGrad

    return OrthoGrad(torch.optim.AdamW(params, fused=True))


def layer(make):
    """Forward and backward of a layer under the loss sum(y * c)."""

    def prepare(spec):
        generator = torch.Generator().manual_seed(0)
        shape = spec["shape"]
        x = torch.randn(shape, generator=generator).requires_grad_()
        c = torch.randn(shape, generator=generator)
        module = make(shape)

        def run():
            x.grad = None
            module.zero_grad(set_to_none=True)
            (module(x) * c).sum().backward()

        return run

    return prepare


def cross_entropy(spec):
    generator = torch.Generator().manual_seed(0)
    rows, classes = spec["shape"]
    logits = torch.randn(rows, classes, generator=generator).requires_grad_()
    labels = torch.randint(classes, (rows,), generator=generator)

    def run():
        logits.grad = None
        torch.nn.functional.cross_entropy(logits, labels).backward()

    return run


OPERATIONS = {
    "AdamW fused": optimizer(lambda p: torch.optim.AdamW(p, fused=True)),
    "AdamW foreach": optimizer(lambda p: torch.optim.AdamW(p, foreach=True)),
    "SGD fused": optimizer(lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True)),
    "SGD foreach": optimizer(lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, foreach=True)),
    "lion-pytorch": optimizer(lion),
    "pytorch-optimizer SPAM": optimizer(spam),
    "pytorch-optimizer OrthoGrad over AdamW fused": optimizer(ortho_grad),
    "BatchNorm1d": layer(lambda shape: torch.nn.BatchNorm1d(shape[1])),
    "BatchNorm2d": layer(lambda shape: torch.nn.BatchNorm2d(shape[1])),
    "LayerNorm": layer(lambda shape: torch.nn.LayerNorm(shape[-1])),
    "RMSNorm": layer(lambda shape: torch.nn.RMSNorm(shape[-1], eps=1e-5)),
    "cross_entropy": cross_entropy,
}


def main():
    run = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "set" in request:
                torch.set_num_threads(request["threads"])
                run = OPERATIONS[request["set"]](request)
                answer = {"ok": True, "version": torch.__version__}
            elif "run" in request:
                start = time.perf_counter()
                run()
                answer = {"seconds": time.perf_counter() - start}
            else:
                run = None
                gc.collect()
                answer = {"ok": True}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


main()
