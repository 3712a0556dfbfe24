#!/usr/bin/env python3
"""The table of scripts/gpu_check.sh: what was measured beside what must be.

    tools/gpu_summary.py LOGS OUT

Reads the logs and results of its stages in LOGS; prints the table and writes OUT/summary.json, and beside it, gathered from all rounds,
OUT/mesa.json, OUT/torch.jsonl and OUT/kernels.json. Exit code 1 if a number that was measured is missed, or a result cannot be read.
"""
import glob
import json
import os
import re
import statistics
import sys

OF_COPY = 0.85


def read(path):
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def parsed(text):
    """JSON, or nothing where a program that failed left half of it, or something else in braces."""
    try:
        return json.loads(text)
    except ValueError:
        return None


class Results:
    """What the stages left, by round."""

    def __init__(self, logs):
        self.logs = logs
        self.stages = {}  # the last exit code of each
        if os.path.exists(self.path("stages")):
            for line in read(self.path("stages")).splitlines():
                stage, code, _ = line.split()
                self.stages[stage] = int(code)
        mesa = {name: parsed(read(self.path(f"mesa_{name}.json"))) for name in self.named("mesa_*.json")}
        self.mesa = {name: result for name, result in mesa.items() if isinstance(result, dict)}
        self.torch = {}
        for name in self.named("torch_*.log"):
            lines = [parsed(line) for line in read(self.path(f"torch_{name}.log")).splitlines() if line.startswith("{")]
            lines = [line for line in lines if isinstance(line, dict)]
            if lines:
                self.torch[name] = lines
        self.kernels = parsed(read(self.path("kernels.json"))) if os.path.exists(self.path("kernels.json")) else None

    def path(self, name):
        return os.path.join(self.logs, name)

    def named(self, pattern):
        before, after = pattern.split("*")
        return sorted(os.path.basename(path)[len(before):-len(after)] for path in glob.glob(self.path(pattern)))

    def policies(self, model, storage):
        """This storage in each round of a model."""
        rounds = [result for name, result in self.mesa.items() if re.fullmatch(model + r"_\d+", name)]
        return [policy for result in rounds for policy in result["policies"] if policy["storage"] == storage]

    def rates(self, model, compiled):
        """PyTorch's images/s by round: waiting for each step, or for all of them at once if that is faster (rate)."""
        return {name: self.rate(line) for name, lines in self.torch.items() if re.fullmatch(model + r"_\d+", name)
                for line in lines if line["compile"] == compiled}

    @staticmethod
    def rate(line):
        return max(line["images_per_second"]["median"], line.get("unwaited_images_per_second") or 0)

    def against_compiled(self, model, tuned=False):
        """Mesa's exact storage, perhaps with tuned products, against torch.compile, round by round."""
        return [policy["images_per_second"]["median"] / rate for name, rate in self.rates(model, True).items()
                for policy in self.mesa.get(("tuned_" if tuned else "") + name, {"policies": []})["policies"] if policy["storage"] == "exact"]

    def run(self, stage):
        """What a short run of mesa-train left: its summary and its lines of metrics, or nothing."""
        folder = self.path(os.path.join("runs", stage))
        if self.stages.get(stage) != 0 or not os.path.exists(os.path.join(folder, "summary.json")):
            return None, []
        return json.loads(read(os.path.join(folder, "summary.json"))), [json.loads(l) for l in read(os.path.join(folder, "metrics.jsonl")).splitlines()]


class Table:
    def __init__(self):
        self.rows = []

    def add(self, what, values, must=None, at_least=True, note=""):
        """A row of the median of `values`, which must be at least, or at most, `must`; without values it was not measured."""
        measured = statistics.median(values) if values else None
        ok = None if measured is None or must is None else bool(measured >= must if at_least else measured <= must)
        self.rows.append({"what": what, "measured": measured, "lowest": min(values, default=None), "highest": max(values, default=None), "must": must,
                          "sense": ">=" if at_least else "<=", "ok": ok, "rounds": len(values), "note": note})

    def passed(self, what, codes):
        """A row of stages, by their exit codes; None or 124 for one that has not come to its end."""
        ended = all(code not in (None, 124) for code in codes) or any(code not in (None, 124, 0) for code in codes)
        self.add(what, [sum(code == 0 for code in codes)] if ended else [], len(codes), note="stages that passed")

    def text(self):
        lines = [("what", "measured", "must", "", "")]
        for row in self.rows:
            measured = "not measured" if row["measured"] is None else number(row["measured"])
            if row["rounds"] > 1:
                measured += f" [{number(row['lowest'])}, {number(row['highest'])}]"
            must = "" if row["must"] is None else f"{row['sense']} {number(row['must'])}"
            lines.append((row["what"], measured, must, {True: "ok", False: "MISSED", None: ""}[row["ok"]], row["note"]))
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[4]]).rstrip() for line in lines)


def number(value):
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def gigabytes(policies, batch):
    return [policy["activation_bytes_per_image"]["median"] * batch / 1e9 for policy in policies]


def speed(results, table):
    small = "DeiT-S, batch 128, bf16: "
    table.add(small + "images/s, exact", [p["images_per_second"]["median"] for p in results.policies("deit_small", "exact")], 10000)
    table.add(small + "exact / torch.compile", results.against_compiled("deit_small"), 1.25)
    table.add(small + "exact, tuned / torch.compile", results.against_compiled("deit_small", True), 1.25)
    for storage in ("int8", "int4"):
        table.add(small + storage + " / exact", [p["relative_speed"]["median"] for p in results.policies("deit_small", storage)], 0.92)
    for model, title, must in (("deit_base", "DeiT-B, batch 128", 1.2), ("deit_tiny", "DeiT-Ti, batch 256", 1.2), ("swin_tiny", "Swin-T, batch 128", 1.3),
                               ("resnet50", "ResNet-50, batch 128, channels_last", 1.0)):
        table.add(title + ": exact / torch.compile", results.against_compiled(model), must)
        table.add(title + ": exact, tuned / torch.compile", results.against_compiled(model, True), must)
    for model in ("deit_small", "deit_base", "deit_tiny", "swin_tiny", "resnet50"):
        for compiled in (False, True):
            table.add(f"PyTorch {model}, {'torch.compile' if compiled else 'eager'}: images/s", list(results.rates(model, compiled).values()))
    autotuned = results.torch.get("max_autotune", [])
    table.add("PyTorch deit_small, torch.compile, max-autotune: images/s", [results.rate(line) for line in autotuned])


def memory(results, table):
    for storage, must in (("exact", 2.4), ("int8", 1.25), ("int4", 0.68)):
        table.add(f"DeiT-S, batch 128: GB kept, {storage}", gigabytes(results.policies("deit_small", storage), 128), must, at_least=False)
    saved = [line["saved_bytes"] / 1e9 for name, lines in results.torch.items() if name.startswith("deit_small_") for line in lines if line.get("saved_bytes")]
    table.add("DeiT-S, batch 128: GB that PyTorch eager saves", saved, note="the Mesa of PyTorch: 3.84 GB for a whole step")
    torch = [line["largest_batch"] for line in results.torch.get("largest", [])]
    run, _ = results.run("mesa_largest")
    config = read(results.path("mesa_fit.log")) if run else ""
    batch = [int(found) for found in re.findall(r"^largest batch within .*: (\d+)$", config, re.M)]
    table.add("DeiT-B in 24 GB: largest batch, PyTorch eager", torch)
    table.add("DeiT-B in 24 GB: int4's / PyTorch eager's", [batch[0] / torch[0]] if batch and torch else [], 4, note=f"batch {batch[0]}" if batch else "")
    log = read(results.path("runs/mesa_largest/log.txt")) if run else ""
    reserved = re.findall(r"GPU memory: (\d+) bytes taken", log)
    table.add("DeiT-B in 24 GB: GB that a run at it takes", [int(reserved[-1]) / 1e9] if reserved else [], 24, at_least=False)


def parity(results, table):
    """Each check of the stage's log is printed as two numbers: the error and what it may be."""
    table.passed("gradients on the device and the CPU: parity", [results.stages.get("parity")])
    path = results.path("parity.log")
    part, worst = "", {}
    for line in read(path).splitlines() if os.path.exists(path) else []:
        if line.startswith("device: "):
            part = "bf16" if "bf16" in line else "fp32"
        found = re.fullmatch(r"\s+([-+.e\d]+|nan|inf) <= ([-+.e\d]+)", line)
        if found:
            worst[part] = max(worst.get(part, 0), float(found[1]) / float(found[2]), key=lambda x: float("inf") if x != x else x)
    for part, must in (("fp32", 1e-4), ("bf16", 2e-2)):
        table.add(f"DeiT-Ti, {part}: largest error of a gradient against the CPU", [worst[part] * must] if part in worst else [], must, at_least=False)


def kernels(results, table):
    rows = [kernel for kernel in (results.kernels or {"kernels": []})["kernels"] if kernel["bytes"] > 0]
    slow = [kernel for kernel in rows if kernel["of_copy"] < OF_COPY]
    lowest = min(rows, key=lambda kernel: kernel["of_copy"])["name"] if rows else ""
    table.add(f"lowest bandwidth of {len(rows)} kernels / copy of as many bytes", [min(k["of_copy"] for k in rows)] if rows else [], OF_COPY, note=lowest)
    for kernel in sorted(slow, key=lambda kernel: kernel["of_copy"]):
        table.add(f"  {kernel['name']}: bandwidth / copy", [kernel["of_copy"]], OF_COPY)
    if results.kernels:
        table.add("copy of 1 GiB: GB/s", [results.kernels["copy_bytes_per_second"] / 1e9])
        for kernel in results.kernels["kernels"]:
            if kernel["flops"] > 0:
                table.add(f"{kernel['name']}: TFLOP/s", [kernel["flops"] / kernel["ms"]["median"] / 1e9])


def beside(results, table, title, what, stages, must, exact=True):
    """Two runs of the same work: images/s of the second / of the first, and where they must be, whether losses and norms are the same bit for bit."""
    (one, lines), (other, same) = (results.run(stage) for stage in stages)
    numbers = lambda rows: [(row["step"], row["loss"], row["grad_norm"]) for row in rows]
    rate = lambda rows: statistics.median(row["images_per_second"] for row in rows[2:] or rows)  # the first choose algorithms, and record
    both = bool(one and other)
    wait = f"waiting for data: {statistics.median(row['data_wait'] for row in same):.1%}" if both else ""
    table.add(f"{title}: images/s {what}", [rate(same) / rate(lines)] if both else [], must, note=wait)
    if exact:
        table.add(f"{title}, {what.split(' / ')[0]}: the same losses and norms, bit for bit",
                  [float(len(lines) > 0 and numbers(lines) == numbers(same))] if both else [], 1)


def graphs(results, table):
    for model, title in (("deit_tiny", "DeiT-Ti"), ("resnet18", "ResNet-18")):
        beside(results, table, f"{title}, batch 16", "with cuda_graph / without", (f"graph_{model}_false", f"graph_{model}_true"), 1)


def ranks(results, table):
    """What a rank among several does besides, on one that is alone."""
    for stage, what in (("connected", "through NCCL / alone"), ("shared", "through NCCL, shared optimizer / alone")):
        beside(results, table, "DeiT-S, batch 128, one rank", what, ("rank_alone", "rank_" + stage), 0.99 if stage == "connected" else None,
               exact=stage == "connected")


def profile(results, table):
    """Where a step's time goes: the kernels that take most of it."""
    for policy in results.mesa.get("profile", {"policies": []})["policies"]:
        for rank, row in enumerate(policy.get("profile", [])[:20], 1):
            table.add(f"DeiT-S, {policy['storage']}: ms a step, kernel {rank}", [row["ms"]], note=f"{row['calls']} x {row['name']}")


def besides(results, table):
    """What has no number to reach."""
    of = lambda name, storage: [p["images_per_second"]["median"] for p in results.mesa.get(name, {"policies": []})["policies"] if p["storage"] == storage]
    own = [p["images_per_second"]["median"] for p in results.policies("deit_small", "exact")]
    cudnn = of("cudnn_attention", "exact")
    table.add("DeiT-S: attention by cuDNN / by our kernels, images/s", [cudnn[0] / statistics.median(own)] if cudnn and own else [])
    host, exact = of("codec_host", "host"), of("codec_host", "exact")
    table.add("DeiT-S: codec host / exact, images/s", [host[0] / exact[0]] if host and exact else [])


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    results, table = Results(sys.argv[1]), Table()
    stage = results.stages.get
    table.passed("kernel tests on the device", [stage("smoke")])
    speed(results, table)
    memory(results, table)
    parity(results, table)
    kernels(results, table)
    table.passed("compute-sanitizer, memcheck and racecheck", [stage("memcheck"), stage("racecheck")])
    table.passed("all tests on the device", [stage("tests")])
    graphs(results, table)
    ranks(results, table)
    besides(results, table)
    profile(results, table)
    print(table.text())
    out = sys.argv[2]
    for name, value in (("summary", table.rows), ("mesa", results.mesa), ("kernels", results.kernels)):
        if value:
            with open(os.path.join(out, name + ".json"), "w", encoding="utf-8") as file:
                json.dump(value, file, indent=1)
                file.write("\n")
    with open(os.path.join(out, "torch.jsonl"), "w", encoding="utf-8") as file:
        for name, lines in results.torch.items():
            for line in lines:
                file.write(json.dumps({"stage": name, **line}) + "\n")
    missed = [row["what"] for row in table.rows if row["ok"] is False]
    print(f"{sum(row['ok'] is True for row in table.rows)} numbers reached, {len(missed)} missed, "
          f"{sum(row['ok'] is None and row['must'] is not None for row in table.rows)} not measured")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
