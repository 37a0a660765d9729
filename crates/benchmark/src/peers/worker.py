"""Runs one operation of a Python package at a time, on demand, and answers with its time.

Reads JSON objects from standard input, a line each: {"set": NAME, ...} prepares an operation,
{"run": true} runs it once, {"end": true} forgets it. Every line is answered by one JSON line.
"""
import gc
import json
import sys
import time

import torch


OPERATIONS = {}


def operation(name):
    """Registers a function from the request to the call that is timed."""

    def register(prepare):
        OPERATIONS[name] = prepare
        return prepare

    return register


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
                parts = run()
                answer = {"seconds": time.perf_counter() - start}
                if isinstance(parts, list):
                    answer["parts"] = parts
            else:
                run = None
                gc.collect()
                answer = {"ok": True}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)

