#!/usr/bin/env bash
# deepspeed 0.19.8: an engine that has been destroyed stays on its model, and is called by the next one.
#
# DeepSpeedEngine.destroy() takes ZeRO-3's own hooks from the modules. It leaves the two hooks of the engine itself, so
# that with each engine that is made over the same model one more of them fires in every forward pass; and on every module
# pre_bwd_fn and post_bwd_fn, which are closures over the destroyed engine's parameter offload. The next engine makes none
# where a module has some: before and after the backward pass of each module it calls the coordinator of the destroyed
# one, which stays alive with all that it refers to.
# Expected: after destroy() nothing of the engine is called, and a collected engine's offload is free.
# Seen (one process, gloo, a model of one nn.Linear in a Sequential; a step with each engine):
#   hooks on the model: with the first engine, after its destroy(), with the second    7, 2, 9
#   pre_bwd_fn on the layer after destroy()                                            still there
#   the second engine's pre_bwd_fn                                                     the same object
#   the first engine's offload after gc.collect()                                      alive
# With these hooks and functions taken off by hand: 7, 2, 7, another object, and the first's offload is free.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q numpy setuptools wheel
"$folder/venv/bin/pip" install -q --no-build-isolation deepspeed==0.19.8
cd "$folder"
cat > engines.py <<'PYTHON'
import gc
import os
import sys
import weakref

os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
import torch
import torch.distributed as dist

store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
import deepspeed

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def engine_over(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=dict(CONFIG))[0]


def hooks(model):
    return len(model._forward_pre_hooks) + len(model._forward_hooks)


def step(engine):
    loss = engine(torch.ones(1, 4)).sum()
    engine.backward(loss)
    engine.step()


def taken_off(engine, model):
    """What destroy() leaves, by hand."""
    for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
        hook.remove()
    for module in model.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            vars(module).pop(name, None)


def two_engines(by_hand):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    first = engine_over(model)
    step(first)
    function, offload = vars(model[0])["pre_bwd_fn"], weakref.ref(first.optimizer.parameter_offload)
    counts = [hooks(model)]
    first.destroy()
    counts.append(hooks(model))
    left = "pre_bwd_fn" in vars(model[0])
    if by_hand:
        taken_off(first, model)
    for parameter in model.parameters():  # these refer to the first engine's optimizer
        vars(parameter).pop("_z3_optimizer", None)
    second = engine_over(model)
    counts.append(hooks(model))
    same = vars(model[0])["pre_bwd_fn"] is function
    del first, function
    step(second)
    gc.collect()
    return counts, left, same, offload() is not None


for by_hand in (False, True):
    counts, left, same, alive = two_engines(by_hand)
    print(
        f"taken off by hand: {by_hand}; hooks on the model {counts}; function left: {left}; "
        f"the second engine has the first's: {same}; the first's offload is alive: {alive}"
    )
    seen = (counts[1] > 0, counts[2] > counts[0], left, same, alive)
    expected = (True, not by_hand, True, not by_hand, not by_hand)
    if seen != expected:
        print("otherwise than stated:", seen, expected)
        sys.exit(1)
PYTHON
"$folder/venv/bin/python" engines.py 2>&1 | grep -v "INFO\|WARNING\|deprecated\|return func"
