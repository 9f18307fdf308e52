#!/usr/bin/env python3
"""What an engine pays today to put 16 inputs back before a replay, in PyTorch: a peer of prologue_benchmark.

A CUDA graph of 300 dependent kernels of about 2 us; 16 buffers (4 of 256 KB, 12 of 8 KB) are restored ahead of each
replay, with tensor.copy_ per buffer and with torch._foreach_copy_. Alternated with the bare replay in one process, at
most 4 launches in flight. Prints a table; --json adds one line of JSON. Needs PyTorch and a GPU.
"""
import argparse
import json
import sys
import time


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("PyTorch is missing", file=sys.stderr)
        return 5
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 5

    ints = [64 << 10] * 4 + [2 << 10] * 12
    live = [torch.zeros(n, dtype=torch.int32, device="cuda") for n in ints]
    originals = [torch.arange(n, dtype=torch.int32, device="cuda") for n in ints]
    total = torch.zeros(1, dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()

    def body():
        for _ in range(300):
            torch.cuda._sleep(3000)

    with torch.cuda.stream(stream):
        body()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            body()
            total.add_(live[0][1])

    def copy_each():
        for to, source in zip(live, originals):
            to.copy_(source, non_blocking=True)

    def copy_foreach():
        torch._foreach_copy_(live, originals, non_blocking=True)

    def median(values):
        return sorted(values)[len(values) // 2]

    def p99(values):
        return sorted(values)[len(values) * 99 // 100]

    rows = []
    for name, restore in (("copy_ per buffer", copy_each), ("_foreach_copy_", copy_foreach)):
        cpu, gpu = {"restore": [], "replay": [], "bare": []}, {"step": [], "bare": []}
        flights = []

        def collect(limit):
            while len(flights) > limit:
                begin, end, kind = flights.pop(0)
                end.synchronize()
                gpu[kind].append(1000 * begin.elapsed_time(end))

        with torch.cuda.stream(stream):
            total.zero_()
            for i in range(arguments.samples + 50):
                for kind in ("step", "bare") if i % 2 == 0 else ("bare", "step"):
                    collect(3)
                    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    begin.record(stream)
                    start = time.perf_counter()
                    if kind == "step":
                        restore()
                    middle = time.perf_counter()
                    graph.replay()
                    stop = time.perf_counter()
                    end.record(stream)
                    flights.append((begin, end, kind))
                    if kind == "step":
                        cpu["restore"].append(1e6 * (middle - start))
                        cpu["replay"].append(1e6 * (stop - middle))
                    else:
                        cpu["bare"].append(1e6 * (stop - middle))
            collect(0)
        for values in (*cpu.values(), *gpu.values()):
            del values[:50]
        for to, source in zip(live, originals):
            assert torch.equal(to, source), "the copies did not run"
        added = [a - b for a, b in zip(gpu["step"], gpu["bare"])]
        rows.append({"name": name, "cpu_restore_us": median(cpu["restore"]), "cpu_restore_p99_us": p99(cpu["restore"]),
                     "cpu_replay_us": median(cpu["replay"]), "cpu_bare_us": median(cpu["bare"]),
                     "gpu_added_us": median(added), "gpu_added_p99_us": p99(added)})

    print(f"PyTorch {torch.__version__}, {torch.cuda.get_device_name()}: 16 buffers, {arguments.samples} samples, medians (p99), us")
    for row in rows:
        print(f"  {row['name']:<18} CPU restore {row['cpu_restore_us']:7.2f} ({row['cpu_restore_p99_us']:.2f})  "
              f"replay {row['cpu_replay_us']:6.2f}  bare replay {row['cpu_bare_us']:6.2f}  "
              f"GPU added {row['gpu_added_us']:6.2f} ({row['gpu_added_p99_us']:.2f})")
    if arguments.json:
        print(json.dumps({"torch": torch.__version__, "device": torch.cuda.get_device_name(), "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
