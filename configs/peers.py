"""Keys of other trainers (timm, Composer, Lightning, transformers), and what they are here."""

from collections.abc import Collection, Sequence

# A key of a recipe, or an example of one: what others call it.
_HERE = {
    "optimizer.name": "opt optim optimizers",
    "optimizer.lr": "lr learning_rate base_lr max_lr",
    "optimizer.scale": "lr_base lr_base_size lr_base_scale lr_scale auto_scale_lr",
    "optimizer.weight_decay": "weight_decay wd",
    "optimizer.momentum": "momentum",
    "optimizer.nesterov": "nesterov",
    "optimizer.betas": "betas opt_betas adam_beta1 adam_beta2",
    "optimizer.eps": "opt_eps adam_epsilon",
    "optimizer.layer_decay": "layer_decay llrd",
    "duration, such as duration: 90 epochs": "epochs max_epochs num_epochs num_train_epochs "
    "max_duration",
    "duration, such as duration: 2000 steps": "steps max_steps total_steps num_steps",
    "global_batch, the samples of one optimizer step over all ranks": "batch_size "
    "train_batch_size total_batch_size",
    "micro_batch; the global_batch / micro_batch of a step are shared out among the ranks": (
        "micro_batch_size device_train_microbatch_size per_device_train_batch_size "
        "grad_accum_steps accumulate_grad_batches gradient_accumulation_steps"
    ),
    "schedule.name": "sched scheduler schedulers lr_scheduler lr_scheduler_type lr_schedule",
    "schedule.warmup, such as schedule.warmup: 5 epochs": "warmup warmup_epochs warmup_steps "
    "warmup_ratio num_warmup_steps",
    "schedule.warmup_start, a factor of optimizer.lr": "warmup_lr warmup_start_lr",
    "schedule.final, a factor of optimizer.lr": "min_lr eta_min final_lr",
    "schedule.every, of schedule step": "decay_epochs step_size",
    "schedule.milestones, of schedule multi_step": "decay_milestones milestones",
    "schedule.gamma": "decay_rate lr_gamma",
    "schedule.patience": "patience_epochs",
    "precision": "amp amp_dtype fp16 bf16 mixed_precision",
    "clip, such as clip: {name: norm, limit: 1}": "clip_grad clip_mode grad_clip max_grad_norm "
    "gradient_clip_val gradient_clip_algorithm grad_clip_norm",
    "backend": "strategy fsdp fsdp_config deepspeed zero_stage",
    "reduction, such as reduction: exact": "deterministic",
    "name": "run_name experiment",
    "data.path": "data_dir dataset data_path train_dir",
    "data.train": "train_split",
    "data.val": "val_split eval_split",
    "data.workers": "workers num_workers dataloader_num_workers",
    "data.image_size": "img_size input_size image_size resolution",
    "data.channels": "in_chans in_channels",
    "data.repeats": "aug_repeats repeated_aug",
    "data.sampling": "sampler",
    "model.name": "arch model_name",
    "model.pretrained": "pretrained",
    "model.checkpoint": "initial_checkpoint checkpoint_path",
    "model.options, such as model.options: {drop_path_rate: 0.1}": "model_kwargs drop drop_rate "
    "drop_path drop_path_rate",
    "model.pool": "gp global_pool",
    "model.compile": "compile torchcompile torch_compile",
    "model.recompute": "grad_checkpointing gradient_checkpointing",
    "model.channels_last": "channels_last",
    "evaluate.crop_fraction": "crop_pct val_crop_ratio",
    "evaluate.batch": "validation_batch_size eval_batch_size per_device_eval_batch_size",
    "evaluate.every": "eval_interval check_val_every_n_epoch val_check_interval eval_steps",
    "augment.mean": "mean",
    "augment.std": "std",
    "augment.flip": "hflip",
    "augment.jitter": "color_jitter",
    "augment.mixup": "mixup",
    "augment.cutmix": "cutmix",
    "augment.mix_switch": "mixup_switch_prob",
    "augment.ops, such as augment.ops: [randaugment]": "aa auto_augment randaugment",
    "augment.ops, such as augment.ops: [erasing]": "reprob random_erasing random_erase",
    "augment.ops, such as augment.ops: [vertical_flip]": "vflip",
    "loss.label_smoothing": "smoothing label_smoothing label_smoothing_factor",
    "loss.name, such as loss: bce": "bce_loss criterion loss_fn",
    "loss.name; jsd, behind an augment.ops that ends with augmix": "jsd_loss aug_splits",
    "loss.class_weights": "class_weights class_weight",
    "average, such as average: {name: ema, half_life: 1 epochs}": "ema ema_decay model_ema "
    "model_ema_decay",
    "average, such as average: {name: swa, start: 70 epochs}": "swa",
    "log.every": "log_interval log_every_n_steps logging_steps",
    "log.wandb": "wandb log_wandb report_to",
    "log.project": "project wandb_project",
    "log.tensorboard": "tensorboard",
    "checkpoint.every": "save_interval recovery_interval save_steps",
    "checkpoint.keep": "checkpoint_hist save_num_checkpoints_to_keep save_total_limit save_top_k",
    "regularise.early_stop": "early_stopping early_stop",
    "regularise.sharpness": "sam asam",
}

# What to read or do where there is no such key: what others call it.
_NOT_OFFERED = {
    "classes are counted in the shards; classes.txt beside them has the names": "num_classes "
    "class_map",
    "see model.norm in docs/craft.md: BatchNorm takes a micro-batch's statistics, at any number "
    "of ranks": "sync_bn sync_batchnorm bn_momentum",
    "see model.channels_last, model.compile and precision for faster steps": "fuser torchscript",
    "see docs/craft.md for what a recipe can say; it runs no code": "callback callbacks algorithms",
    "see log, and docs/monitoring.md": "logger loggers",
    "see `bigbatch train RECIPE --nproc N`": "devices gpus num_gpus nproc world_size",
    "see `bigbatch submit RECIPE --nodes N`": "nodes num_nodes nnodes",
    "see docs/commands.md: a GPU for each rank where there are some, else the CPU": "device "
    "accelerator",
    "see `bigbatch resume RUN`, or model.checkpoint for weights to start from": "resume "
    "resume_from_checkpoint load_path ckpt_path autoresume",
    "see `bigbatch train RECIPE --runs FOLDER`": "output output_dir save_folder default_root_dir",
    "see `bigbatch check RECIPE`, which starts nothing": "fast_dev_run dry_run",
    "see log.details_every, and docs/monitoring.md": "profiler profile",
    "see `bigbatch find-lr RECIPE`": "auto_lr_find lr_find",
    "see `bigbatch find-micro-batch RECIPE`": "auto_scale_batch_size auto_find_batch_size",
    "see `bigbatch evaluate RUN --tta`": "tta",
    "see docs/loading.md: each image is sampled once": "interpolation train_interpolation",
    "see docs/loading.md: buffers follow from data.workers": "prefetch_factor prefetch pin_memory",
    "see duration, which makes a trial short": "limit_train_batches limit_val_batches",
}

HERE = {name: key for key, names in _HERE.items() for name in names.split()}
NOT_OFFERED = {name: why for why, names in _NOT_OFFERED.items() for name in names.split()}


def peers_key(place: Sequence[str], near: Collection[str]) -> str | None:
    """What to write for an unknown key at a place that another trainer has; None where none has.

    `near` are valid keys of that part that look alike: inside a part they are the likelier ones.
    """
    key, part = place[-1].lower().replace("-", "_"), ".".join(place[:-1])
    here = HERE.get(key)
    if part and near and not (here and here.startswith(f"{part}.")):
        return None
    if here is not None and here.split(",")[0].split(";")[0] != ".".join(place):
        return f"unknown here; write {here}"
    why = NOT_OFFERED.get(key)
    return None if why is None else f"not offered; {why}"
