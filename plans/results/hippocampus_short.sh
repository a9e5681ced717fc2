#!/usr/bin/env bash
# VM-UNet-3D and the stock network on Task04 Hippocampus: the same 250 iterations, CPU.
#
#   hippocampus_short.sh RAW_DATASET_FOLDER WORK_FOLDER [SGD|AdamW]
#
# RAW_DATASET_FOLDER is Dataset004_Hippocampus in nnU-Net's raw layout (195 or 260 cases). The arms share patch, batch
# size (2 instead of the planned 7: CPU), data, fold, optimizer (nnU-Net's SGD at 1e-2, or AdamW at 1e-3 with decay 1e-2
# and one epoch of warm-up; polynomial decay) and number of iterations; only the network differs. They train side by side, one core each, so their
# times can be compared with each other.
set -euo pipefail
raw=$(realpath "$1") work=$(realpath -m "$2") here=$(realpath "$(dirname "$0")")
export OPTIMIZER=${3:-SGD}
case $OPTIMIZER in
    SGD) warmup=0 name=hippocampus_short ;;
    AdamW) warmup=1 name=hippocampus_short_adamw ;;
    *) echo "unknown optimizer $OPTIMIZER; known: SGD, AdamW" >&2 && exit 2 ;;
esac
mkdir -p "$work"/{raw,preprocessed,results,trainers,images,predictions}
export nnUNet_raw=$work/raw nnUNet_preprocessed=$work/preprocessed nnUNet_results=$work/results
export nnUNet_n_proc_DA=0 nnUNet_def_n_proc=1 # augmentation in the training process: its time counts
[ -e "$work/raw/Dataset004_Hippocampus" ] || ln -s "$raw" "$work/raw/Dataset004_Hippocampus"

# The stock network trains with the stock trainer, shortened: nnU-Net keeps its schedule in classes.
cat > "$work/trainers/short_schedule.py" <<'PY'
import os

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from medmamba.nnunet import optimisation
from medmamba.nnunet.schedule import Schedule


class nnUNetTrainer_short(nnUNetTrainer):
    def initialize(self):
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 10, 25, 5
        super().initialize()

    def configure_optimizers(self):
        if os.environ["OPTIMIZER"] == "SGD":
            return super().configure_optimizers()
        return optimisation.configure(self.network, Schedule.create(num_epochs=10, optimizer="AdamW", warmup_epochs=1))
PY
export nnUNet_extTrainer="$work/trainers"
eval "$(medmamba env)"

if [ ! -e "$nnUNet_preprocessed/Dataset004_Hippocampus/nnUNetPlans_3d_fullres" ]; then
    nnUNet_n_proc_DA=1 nnUNetv2_plan_and_preprocess -d 4 -c 3d_fullres -npfp 1 -np 1 --verify_dataset_integrity
fi
schedule=(--batch-size 2 --epochs 10 --iterations 25 --val-iterations 5 --optimizer "$OPTIMIZER" --warmup-epochs "$warmup")
medmamba plan -d 4 --network vmunet -c 3d_fullres "${schedule[@]}"
python - <<'PY'
import json, os
folder = os.path.join(os.environ["nnUNet_preprocessed"], "Dataset004_Hippocampus")
plans = json.load(open(os.path.join(folder, "nnUNetPlans.json")))
plans["plans_name"] = "nnUNetBatch2Plans"
plans["configurations"]["3d_fullres"]["batch_size"] = 2
json.dump(plans, open(os.path.join(folder, "nnUNetBatch2Plans.json"), "w"), indent=4)
PY

arms=(
    "nnUNetTrainerVMUNet nnUNetMedMambaVMUNetPlans"
    "nnUNetTrainer_short nnUNetBatch2Plans"
)
running=()
for arm in "${arms[@]}"; do
    read -r trainer plans <<<"$arm"
    # Pinned, because nnU-Net starts as many threads as there are cores whatever OMP_NUM_THREADS says.
    taskset --cpu-list "${#running[@]}" nnUNetv2_train 4 3d_fullres 0 -tr "$trainer" -p "$plans" -device cpu &
    running+=($!)
done
for pid in "${running[@]}"; do wait "$pid"; done

# Every trained folder also predicts with the stock command; the fold's validation images serve as input.
python - "$work" <<'PY'
import json, os, shutil, sys
work = sys.argv[1]
splits = json.load(open(f"{work}/preprocessed/Dataset004_Hippocampus/splits_final.json"))
for case in splits[0]["val"]:
    shutil.copy(f"{work}/raw/Dataset004_Hippocampus/imagesTr/{case}_0000.nii.gz", f"{work}/images")
PY
for arm in "${arms[@]}"; do
    read -r trainer plans <<<"$arm"
    out=$work/predictions/$trainer-$plans
    SECONDS=0
    nnUNetv2_predict -i "$work/images" -o "$out" -d 4 -c 3d_fullres -f 0 -tr "$trainer" -p "$plans" \
        -device cpu -npp 1 -nps 1
    echo "$SECONDS" > "$out/seconds.txt"
    nnUNetv2_evaluate_simple "$work/raw/Dataset004_Hippocampus/labelsTr" "$out" -l 1 2 -np 1 --chill
done
python "$here/../../tools/collect_results.py" "$nnUNet_results/Dataset004_Hippocampus" --predictions "$work/predictions" \
    --out "$here/$name.csv"
