"""Our trainers: nnU-Net's training with a network of ours and a schedule that is data in the plans.

``nnUNetv2_train D CONFIG FOLD -tr nnUNetTrainerVMUNet`` works on plans written by ``medmamba plan`` and on
stock plans alike. In the second case the trainer derives the architecture itself, in memory, and nnU-Net
writes the derived plans beside the checkpoints. Those plans name the network by import path, and the
checkpoint names the stock ``nnUNetTrainer``: a trained folder predicts with stock nnU-Net wherever medmamba
is installed, with no trainer of ours to be found and no variable to be set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from medmamba.nnunet import optimisation
from medmamba.nnunet.architecture import (
    ArchitectureError,
    architecture_block,
    check_patch,
    network_of,
    placed_mixer,
)
from medmamba.nnunet.distillation import Distillation, DistillationLoss
from medmamba.nnunet.guard import NonFiniteGradientsError, NonFiniteLossError, dump, refuse_non_finite_gradients
from medmamba.nnunet.lasting import LastingTrainer
from medmamba.nnunet.names import TRAINER_VARIANTS, TrainerVariant, trainer_name
from medmamba.nnunet.schedule import Schedule
from medmamba.nnunet.task import Task
from medmamba.nnunet.teacher import Teacher, load_teacher
from medmamba_kernels import BadStepError


class MambaTrainer(LastingTrainer):
    """Base of our trainers: a variant says which network, and what else its name says, which wins over the plans.

    Attributes:
        distillation: which teacher the plans name, or None.
        teacher: while it trains, the networks of that teacher.
    """

    variant: ClassVar[TrainerVariant]

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 (the signature of nnU-Net)
    ) -> None:
        super().__init__(
            plans_with_network(plans, configuration, self.variant),
            configuration,
            fold,
            dataset_json,
            device,
        )
        if len(self.configuration_manager.pool_op_kernel_sizes) < 3:
            # nnU-Net gives the coarsest output no weight; if it is the only one, the loss would be 0 / 0.
            self.enable_deep_supervision = False
        self.distillation = Distillation.from_plans(plans)
        self.teacher: Teacher | None = None
        self.schedule = schedule_of(plans, self.variant)
        self.num_epochs = self.schedule.num_epochs
        self.num_iterations_per_epoch = self.schedule.num_iterations_per_epoch
        self.num_val_iterations_per_epoch = self.schedule.num_val_iterations_per_epoch
        self.initial_lr = self.schedule.initial_lr
        self.weight_decay = self.schedule.weight_decay
        self.save_every = self.schedule.save_every
        self.has_bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        if self.has_bf16:
            # bfloat16 has the range of float32: there is nothing to scale.
            self.grad_scaler = None

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The network of the plans when it is ours, else ours in the shape of the plans (also used in prediction)."""
        block = own_block(configuration_manager.configuration, cls.variant)
        network: nn.Module = get_network_from_plans(
            block["network_class_name"],
            block["arch_kwargs"],
            block["_kw_requires_import"],
            num_input_channels,
            num_output_channels,
            allow_init=True,
            deep_supervision=enable_deep_supervision,
        )
        if not enable_deep_supervision:
            # No loss reads the other heads, and DistributedDataParallel refuses parameters without a gradient.
            decoder: Any = network.decoder
            decoder.seg_layers[1:].requires_grad_(False)
        return network

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, optimisation.WarmupLR]:
        """Optimizer and learning rate of the schedule."""
        # Attributes are read again because people change them after construction, as nnU-Net's variants do.
        schedule = replace(
            self.schedule,
            num_epochs=self.num_epochs,
            initial_lr=self.initial_lr,
            weight_decay=self.weight_decay,
        )
        optimizer, lr_scheduler = optimisation.configure(self.bare_network, schedule)
        optimizer.register_step_pre_hook(self._look_at_gradients)
        return optimizer, lr_scheduler

    def _look_at_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.gradient_norm = refuse_non_finite_gradients(optimizer)

    def _build_loss(self) -> nn.Module:
        loss: nn.Module = super()._build_loss()
        if self.distillation is None:
            return loss
        return DistillationLoss(
            loss,
            weight=self.distillation.weight,
            temperature=self.distillation.temperature,
            has_regions=self.label_manager.has_regions,
            ignore_label=self.label_manager.ignore_label,
        )

    def on_train_start(self) -> None:
        """nnU-Net's, with the teacher of the plans.

        Raises:
            TeacherError: it is not there, is another one, or does not fit.
        """
        if self.distillation is not None:
            task = Task.of(self.plans_manager.plans, self.configuration_name, self.dataset_json)
            self.teacher = load_teacher(self.distillation, task, self.device)
        super().on_train_start()
        self.print_to_log_file(
            f"medmamba {version('medmamba')}: network {self.variant.network}, {self.schedule}, "
            f"autocast {'bfloat16' if self.has_bf16 else 'float16' if self.device.type == 'cuda' else 'off'}"
        )
        if self.distillation is not None:
            self.print_to_log_file(f"Learning from a teacher: {self.distillation}")

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One iteration of nnU-Net, in bfloat16 where the GPU has it.

        Raises:
            NonFiniteLossError: loss, gradients or the step sizes of a scan are NaN or infinite, here or in another
                process of a multi-GPU training. The weights are those before this iteration; batch and weights have
                been written beside the checkpoints.
        """
        try:
            with self._autocast_default(), self._taught(batch) as taught:
                result = super().train_step(taught)
        except BadStepError as error:
            raise self._not_finite(batch, f"a scan stopped ({error})") from error
        except NonFiniteGradientsError as error:
            raise self._not_finite(batch, str(error)) from error
        is_finite = bool(np.all(np.isfinite(result["loss"])))  # if not, a GradScaler has left the step out
        problem = None if is_finite else self._not_finite(batch, f"the training loss is {float(result['loss'])}")
        if self.is_ddp:
            problem = _of_any_process(problem, self.device)
        if problem is not None:
            raise problem
        return result

    @contextmanager
    def _taught(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Within ``with`` the loss knows the teacher's answer; gives the batch with its data on the device."""
        if self.teacher is None:
            yield batch
            return
        data = batch["data"].to(self.device, non_blocking=True)
        with torch.autocast("cuda") if self.device.type == "cuda" else nullcontext():
            answers = self.teacher.answers(data)
        with self.loss.taught(answers):
            yield {**batch, "data": data}
        self.loss_parts = {name: float(value) for name, value in self.loss.parts.items()}

    def _not_finite(self, batch: dict[str, Any], what: str) -> NonFiniteLossError:
        where = f"epoch_{self.current_epoch}_iteration_{self.iteration}_rank_{self.local_rank}"
        facts = {"epoch": self.current_epoch, "iteration": self.iteration, "schedule": self.schedule.to_dict()}
        path = Path(self.output_folder) / f"not_finite_{where}.pth"
        written = dump(path, batch, self.bare_network, facts)
        return NonFiniteLossError(
            f"{what} at epoch {self.current_epoch}, iteration {self.iteration} "
            f"(cases {', '.join(map(str, batch.get('keys', ['unknown'])))}); training stops before the weights change, "
            f"and the checkpoints of earlier epochs in {self.output_folder} stay. Look for NaN or extreme values in "
            f"batch and weights ({written}); if the cases are sound, plan a lower learning rate (--lr) or a warm-up "
            "(--warmup-epochs)"
        )

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        with self._autocast_default():
            return super().validation_step(batch)

    def facts(self) -> dict[str, Any]:
        """What really trained a checkpoint; its ``trainer_name`` is the stock one."""
        facts = {
            "version": version("medmamba"),
            **super().facts(),
            "network": self.variant.network,
            "schedule": self.schedule.to_dict(),
        }
        return facts if self.distillation is None else {**facts, "distillation": self.distillation.to_dict()}

    def _autocast_default(self) -> AbstractContextManager[None]:
        return autocast_default("cuda", torch.bfloat16) if self.has_bf16 else nullcontext()


def _trainer(name: str, variant: TrainerVariant) -> type[MambaTrainer]:
    return type(name, (MambaTrainer,), {"variant": variant, "__module__": __name__})


class _Trainers(Mapping[str, type[MambaTrainer]]):
    """The classes, each made when it is first asked for (``made``): there are thousands of names."""

    def __init__(self) -> None:
        self.made: dict[str, type[MambaTrainer]] = {}

    def __getitem__(self, name: str) -> type[MambaTrainer]:
        if name not in self.made:
            self.made[name] = _trainer(name, TRAINER_VARIANTS[name])
        return self.made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(TRAINER_VARIANTS)

    def __len__(self) -> int:
        return len(TRAINER_VARIANTS)


#: Every trainer by its name, e.g. ``nnUNetTrainerVMUNet`` and ``nnUNetTrainerVMUNet_Vim3D_Identity_50epochs``.
TRAINERS = _Trainers()


def __getattr__(name: str) -> type[MambaTrainer]:
    # nnU-Net and pickle look trainers up by the name of their module.
    if name in TRAINERS:
        return TRAINERS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def schedule_of(plans: dict[str, Any], variant: TrainerVariant) -> Schedule:
    """The schedule of the plans, with what the name of the trainer says.

    Raises:
        ScheduleError: a bad entry in the plans, or a warm-up that is longer than the epochs of the name.
    """
    schedule = Schedule.from_plans(plans)
    if variant.epochs is not None:
        schedule = replace(schedule, num_epochs=variant.epochs)
    return schedule.for_finetuning() if variant.is_finetuning else schedule


def own_block(configuration: Mapping[str, Any], variant: TrainerVariant) -> dict[str, Any]:
    """The architecture block of a configuration when it names the variant's network, else one derived from it.

    Args:
        configuration: of the plans, with what it inherits.
        variant: what the name of the trainer says; its mixer and control replace those of the block.

    Raises:
        ArchitectureError: the block names another network of medmamba, or has no strides.
    """
    block = configuration["architecture"]
    options: dict[str, Any] = {} if variant.ssm_mode is None else {"ssm_mode": variant.ssm_mode}
    if variant.mixer is not None:
        options["mixer"] = placed_mixer(variant.mixer, configuration)
    named = network_of(block)
    if named is None:
        return architecture_block(variant.network, block, options)
    if named != variant.network:
        raise ArchitectureError(
            f"the plans were made for the network {named}, the trainer trains {variant.network}; use "
            f"{trainer_name(named)}, or plans from `medmamba plan --network {variant.network}`"
        )
    return {**block, "arch_kwargs": {**block["arch_kwargs"], **options}}


def plans_with_network(plans: dict[str, Any], configuration: str, variant: TrainerVariant) -> dict[str, Any]:
    """A copy of the plans in which ``configuration`` names the variant's network; the caller's plans stay as they are.

    Raises:
        ArchitectureError: the plans were made for another network, or the patch does not fit the strides.
    """
    plans = deepcopy(plans)
    manager = PlansManager(plans).get_configuration(configuration)
    block = own_block(manager.configuration, variant)
    check_patch(manager.patch_size, block["arch_kwargs"]["strides"])
    plans["configurations"][configuration]["architecture"] = block
    return plans


@contextmanager
def autocast_default(device_type: str, dtype: torch.dtype) -> Iterator[None]:
    """Change the dtype that ``torch.autocast(device_type)`` takes when it is given none, as nnU-Net calls it."""
    before = torch.get_autocast_dtype(device_type)
    torch.set_autocast_dtype(device_type, dtype)
    try:
        yield
    finally:
        torch.set_autocast_dtype(device_type, before)


def _of_any_process(error: NonFiniteLossError | None, device: torch.device) -> NonFiniteLossError | None:
    """The error of the first process that has one, in every process.

    The others would go on to the next iteration and wait there for its gradients. (Gradients that are not finite are
    the same everywhere, and stop every process by themselves.)
    """
    number = torch.tensor(0.0 if error is None else 1.0, device=device)
    dist.all_reduce(number)
    if number == 0:
        return None
    texts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, None if error is None else str(error))
    return NonFiniteLossError(next(text for text in texts if text is not None))
