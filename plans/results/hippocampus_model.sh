#!/usr/bin/env bash
# A small model of the hippocampus to try prediction with: fold 0 of Dataset004_Hippocampus, exported in float16.
#
#     bash plans/results/hippocampus_model.sh WORK_FOLDER DATASET_FOLDER
#
# DATASET_FOLDER is nnU-Net's raw Dataset004_Hippocampus. tests/data/models/hippocampus is its result at commit 556282c
# (torch 2.15.0, nnunetv2 2.8.1): mean Dice 0.869 on the 39 validation cases, 18 min 49 s and 1,917 CPU seconds on two
# cores that were busy with other work too. nnU-Net draws crops and initial values without a seed, so two runs give two
# models.
set -euo pipefail

work=$(realpath -m "$1") dataset=$(realpath "$2")
export nnUNet_raw=$work/raw nnUNet_preprocessed=$work/preprocessed nnUNet_results=$work/results
export nnUNet_n_proc_DA=0 nnUNet_compile=f
raw=$nnUNet_raw/Dataset004_Hippocampus plans=nnUNetHippocampusModelPlans
mkdir -p "$raw" "$nnUNet_preprocessed" "$nnUNet_results"

# Images are turned to one orientation in training, and so in prediction.
ln -sfn "$dataset/imagesTr" "$raw/imagesTr"
ln -sfn "$dataset/labelsTr" "$raw/labelsTr"
python - "$dataset/dataset.json" "$raw/dataset.json" <<'EOF'
import json, sys
content = json.load(open(sys.argv[1]))
content["overwrite_image_reader_writer"] = "NibabelIOWithReorient"
json.dump(content, open(sys.argv[2], "w"), indent=1)
EOF

medmamba plan -d 4 -c 3d_fullres --network vmunet --variant small --plans-name $plans -np 1 \
    --batch-size 2 --patch-size 40 56 40 \
    --epochs 40 --iterations 50 --val-iterations 2 --warmup-epochs 2 --optimizer AdamW --lr 3e-3
nnUNetv2_preprocess -d 4 -c 3d_fullres -plans_name $plans -np 1
medmamba train 4 3d_fullres 0 -p $plans -device cpu
medmamba export "$nnUNet_results"/Dataset004_Hippocampus/*__${plans}__3d_fullres -o "$work/hippocampus" --fold 0 --half \
    --licence CC-BY-SA-4.0 --intended-use "A small model to try medmamba predict with: hippocampus in cropped T1 MRIs."
