"""Does training under the evidence make a network that predicts better, where images are few?

Command    python -m training.study --config configs/study_digits_trainings.py \
           --workdir checkpoints/study_digits_trainings --resume
Data       digits (embedded): 100 training images, clean and with 20 % wrong labels; 180 validation and 360 test images,
           10 classes; 5 shifts of 200 test images at 5 severities; the test images inverted, and noise
Hardware   2 CPU cores, no GPU, under 4 GB of memory
Time       about two hours on one core: a cell takes 8 to 14 minutes
Expected   The table of docs/results.md: with 100 images MAP of AdamW .61, its ensemble .41, its variational posterior
           .69, and .60 with folded kernels and a g-prior; MAP of posthoc .80, of online .91, of joint 2.1
Methods    MAP by AdamW, alone and with a temperature from folds of the training images; a deep ensemble of five; MAP
           for a prior that stays ("posthoc"), for one that the evidence updates ("online"), and with weights that
           follow the evidence as well ("joint"), each with posteriors of the last layer and of all weights, by their
           evidence or bound alone. For AdamW one switch each: batch normalisation folded into kernels, normalisation
           layers without a posterior, a g-prior, a prior precision for each layer.
"""

from training.config import Config, Curvature, Data, Evaluation, Model, Optimizer, Prior
from training.study.config import Measures, Posterior, Regime, Study, Training

FEW = {"data.train_examples": 100, "optimizer.epochs": 120, "optimizer.polish_epochs": 240}
WRONG = {"data.wrong_labels": 0.2}
# The gradient of the log-determinant is held for few steps, and these are small; see docs/decisions.md.
JOINT = {"prior.update": "joint", "prior.every_steps": 5, "optimizer.polish_learning_rate": 1e-3}
study = Study(
    config=Config(
        data=Data(name="digits"),
        model=Model(variant="digits"),
        optimizer=Optimizer(learning_rate=3e-3, batch_size=32, polish_learning_rate=1e-2),
        prior=Prior(precision=0.1),
        curvature=Curvature(num_probes=32, max_vectors=384, microbatch=64),
        evaluation=Evaluation(grid_size=17, grid_low=1e-1, grid_high=1e7),
    ),
    regimes=(
        Regime("clean_100", FEW),
        Regime("wrong_100", FEW | WRONG),
    ),
    seeds=(0, 1, 2, 3, 4),
    trainings=(
        Training("adamw", weight_decay=0.5, ensemble=5),
        Training("posthoc", folds=0),
        Training("online", {"prior.update": "online"}, folds=0),
        Training("joint", JOINT, folds=0),
    ),
    posteriors=(
        Posterior("full", "variational", weights="last_layer", trainings=("adamw", "posthoc", "online")),
        Posterior("lanczos", "laplace"),
        Posterior("lanczos", "variational"),
        # One switch each.
        Posterior("lanczos", "variational", folded=True, trainings=("adamw",)),
        Posterior("lanczos", "variational", weights="without_normalisation", trainings=("adamw",)),
        Posterior("lanczos", "variational", prior="g", trainings=("adamw",)),
        Posterior("lanczos", "variational", prior="layerwise", trainings=("adamw",)),
        Posterior("lanczos", "variational", prior="g", folded=True, trainings=("adamw",)),
    ),
    measures=Measures(foreign=("inverted", "noise"), max_iterations=40),
    shown=("adamw.map", "adamw.map-t-split", "adamw.ensemble", "online.map", "online.lanczos-variational"),
)
