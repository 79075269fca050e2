"""Every key there is, with the values that most runs share; the other files override what differs.

python -m osprey_jax.train --config=configs/FILE.py --workdir=DIR --config.KEY=VALUE
"""

from ml_collections import ConfigDict

from osprey_jax.config import OspreyConfig


def get_config() -> ConfigDict:
    """Stage 3's optimisation of the released model; no data is named."""
    config = ConfigDict()

    # Of the first parameters, and of the order of the data.
    config.seed = 0
    # A checkpoint whose parameters the first step begins with, and whose sizes and tokenizer count, or a run,
    # whose export is taken, else its newest checkpoint; empty: fresh parameters of the sizes in
    # `config.model`.
    config.init_from = ""

    # Updates, or 0 for so many that every source is gone through `epochs` times; then those are 0.
    config.steps = 0
    config.epochs = 2.0
    # Dialogues of one update, over all devices.
    config.batch_size = 4
    # Parts that a batch is computed in, one after another; what is learned is the same.
    config.accumulation = 1

    # AdamW. The learning rate rises over a share of the steps, then falls to 0 along a cosine.
    config.learning_rate = 1e-5
    config.warmup = 0.03
    config.b1 = 0.9
    config.b2 = 0.999
    config.weight_decay = 0.0
    # The largest norm of all gradients together; 0 for no clipping.
    config.clip_norm = 1.0
    # A norm so many times the usual one is told, with the samples of its batch; 0: never.
    config.spike = 10.0
    # Leaves such updates out, and those whose gradients are no numbers, which otherwise end the run.
    config.skip_spikes = False

    # Regular expressions: a parameter whose whole path one of them matches is trained, the rest is frozen.
    config.trained = (".*",)
    # Low-rank adapters beside matrices of the decoder's layers (rank 0: none), for small machines. Then they
    # are trained and the decoder itself is frozen; what `trained` names of the rest is trained as ever. The
    # exported model has them merged in. A matrix is a target where a regular expression matches its whole
    # path. What an adapter gives is multiplied by alpha / rank.
    config.lora = ConfigDict({"rank": 0, "alpha": 16.0, "targets": ("decoder/layers/(self_attn|mlp)/.*",)})
    # Of the frozen parameters ("float32" or "bfloat16"); trained ones are float32.
    config.frozen_dtype = "bfloat16"
    # Of the first moments: "bfloat16" takes two bytes less for each trained parameter.
    config.mu_dtype = "float32"
    # What the tower and the decoder compute in; norms, softmax, extractor and loss are float32 in any case.
    config.dtype = "bfloat16"

    # What of the decoder's layers the backward pass computes again, to need less memory: "none", "full" (all
    # but their inputs) or "dots" (all but their inputs and what their matrices give).
    config.remat = "none"

    # Devices: copies of the parameters (0: as many as there is room for), parts that parameters and batch are
    # split in, and parts that heads and widths are split in.
    config.mesh = ConfigDict({"data": 0, "fsdp": 1, "tensor": 1})

    # Seconds at one thing, be it a step, its data or a save, after which it is told what hangs; 0: never.
    config.patience = 600.0
    # In updates. Progress and TensorBoard; `metrics.jsonl` has every step.
    config.log_every = 10
    config.checkpoint_every = 500
    # The newest ones that stay. With one alone nothing could stand in for a damaged one.
    config.keep_checkpoints = 3
    # In updates: the checkpoints of these steps stay beside the newest ones, for good; 0 for none.
    config.keep_every = 0
    # The loss of so many batches of each source of `data.held_out`, which stay in memory; 0 for none.
    config.eval_every = 0
    config.eval_batches = 8
    # Then so many samples of each are answered and go to TensorBoard as pictures, and of `shapes` 64 regions
    # are described, of which `exact_match` is the share that is right. Meanwhile a copy of the parameters, in
    # `dtype`, is in memory as well (14 GB of 7 billion). 0 for losses alone.
    config.eval_samples = 4

    config.data = ConfigDict(
        {
            # Where the data sets are: `python -m data_pipelines --help` tells their places under it.
            "root": "",
            # Names of data sets, "custom:FILE.jsonl" for your own, or directories that `python -m
            # data_pipelines prepare` wrote. Without weights each counts by its size.
            "sources": (),
            "weights": (),
            # The same, of data that isn't trained on.
            "held_out": (),
            # A directory with tokenizer.model or tokenizer.json; empty: that of `init_from`, or of shapes.
            "tokenizer": "",
            # Lengths of rows and numbers of an image's regions that batches are padded to. The last is also
            # the limit: a conversation that doesn't fit is split between turns, and each epoch has another
            # part of it. Image tokens count.
            "buckets": ((2048, 32),),
            # How many conversations about one image may stand behind its one prefix, and how many images a
            # row may hold. What is learned from each is the same; above 1 give `steps`, not `epochs`.
            "share_image": 1,
            "images_per_row": 1,
            # The share of broken samples, of the last 1,000 or the first 100, beyond which training stops.
            "tolerance": 0.05,
            # System texts that conversations draw from: "training" and "inference" (see `osprey_jax.prompt`).
            "systems": ("training",),
            # What weighs the same in the loss: every "dialogue" or every "token".
            "loss_per": "dialogue",
            # Processes that prepare samples (0: none but this one), threads in each, and batches made ahead.
            "workers": 0,
            "threads": 2,
            "prefetch": 2,
        }
    )
    # Sizes of the model, key by key as in `osprey_jax.config.OspreyConfig`.
    config.model = ConfigDict(OspreyConfig().to_dict())
    config.lock()
    return config
