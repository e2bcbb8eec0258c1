"""Mistakes that users make, each with the line that answers it: what it names, and what is near.

`World` makes a folder with data, gin files, a trained run, networks and adapters. `MISTAKES` are
commands in that folder, with the files that they need beside; none may be accepted. The tests run
them in one process, `benchmarks/mistakes.py` each in its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping

from tiny_runs import CONFIG, write_gin

TRAIN = "train --gin_file=m.gin --gin.DATA_DIR='data' --run_dir=new"
CHECK = "check --gin_file=m.gin --gin.DATA_DIR='data'"
GOES_ON = "train --gin_file=m.gin --gin.DATA_DIR='data' --run_dir=trained"
SWEEP = "sweep --gin_file=m.gin --gin.DATA_DIR='data' --run_dir=new"
INFER = "infer --run_dir=trained --input=in.jsonl --output=out.jsonl"
INCLUDE = "include 'run.gin'\n"
ASKED = '{"input": "ab", "task": "up", "language": "x"}\n'

FOLDER = "a folder"  # in place of the text of a file
CUT = "the first half of what is there"
GONE = "<gone>"  # of a file

SWEEPING = """\
SEED = 0
Run.seed = %SEED
Sweep.name = 'ranks'
"""
TWO_STAGES = """\
Run.base = @base/Run()
base/Run.base = 'random'
base/Run.adapters = None
base/Run.total_steps = 2
"""


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A command that must be refused.

    Attributes:
      name: what the user has done.
      line: the command, split at spaces.
      culprit: a part of the answer: what is wrong.
      near: another part: the nearest valid name, where there is one.
      place: another part: file and line, or flag.
      files: by path in the world, a text, bytes, FOLDER, CUT or GONE, there while the command runs.
    """

    name: str
    line: str
    culprit: str
    near: str = ""
    place: str = ""
    files: Mapping[str, str | bytes] = dataclasses.field(default_factory=dict)


def gin(
    name: str, text: str, culprit: str, near: str = "", *, place: str = "m.gin:2", line: str = TRAIN
) -> Mistake:
    """A gin file of one's own that begins by including the world's, so that `text` is on line 2."""
    return Mistake(name, line, culprit, near, place, {"m.gin": INCLUDE + text})


def flag(name: str, more: str, culprit: str, near: str = "", line: str = TRAIN) -> Mistake:
    """A flag beside a gin file that is sound."""
    place = more if more.startswith("--gin.") else ""
    return Mistake(name, f"{line} {more}", culprit, near, place, {"m.gin": INCLUDE})


def data(name: str, files: Mapping[str, str | bytes], culprit: str, text: str = "") -> Mistake:
    """A data file with something wrong in it."""
    return Mistake(name, CHECK, culprit, files={"m.gin": INCLUDE + text, **files})


def command(
    name: str, line: str, culprit: str, near: str = "", files: Mapping[str, str | bytes] = {}
) -> Mistake:
    return Mistake(name, line, culprit, near, files=files)


def infer(name: str, text: str | bytes, culprit: str, near: str = "", more: str = "") -> Mistake:
    return Mistake(name, f"{INFER} {more}".strip(), culprit, near, files={"in.jsonl": text})


TRAINING = "data/up/train/x.jsonl"
GOOD = '{"input": "ab", "target": "AB"}\n'

NAMES = (
    gin("class misspelt", "AdapterSpce.alpha = 8", "'AdapterSpce'", "'AdapterSpec'"),
    gin("parameter misspelt", "AdapterSpec.alhpa = 8", "'alhpa'", "'alpha'"),
    gin("parameter misspelt in a scope", "task/FeatureType.rnak = 8", "'rnak'", "'rank'"),
    gin("macro misspelt", "XtremeUp.data_dir = %DATA_DRI", "%DATA_DRI", "'DATA_DIR'"),
    flag("macro misspelt in a flag", "--gin.DATA_DRI='x'", "%DATA_DRI", "'DATA_DIR'"),
    gin("reference misspelt", "Run.mixture = @Mixtrue()", "'Mixtrue'", "'Mixture'"),
    gin("class in place of an object", "Run.mixture = @Mixture", "@Mixture", "@Mixture()"),
    gin("macro called as a class", "Mixture = 3", "Mixture is not a macro", "Mixture.PARAMETER"),
    gin("macros in a circle", "A = %B\nB = %A\nRun.seed = %A", "%A refers to itself", place="m.gin:3"),
    gin("nothing behind the equals sign", "Run.seed = ", "syntax error"),
    gin("text without quotes", "Run.base = random", "syntax error"),
    gin("bracket left open", "Mixture.held_out = ('up/y',", "syntax error", place="m.gin:"),
    flag("text without quotes in a flag", "--gin.Run.base=runs/x", "runs/x is not a value", "'runs/x'"),
    flag("flag without value", "--gin.Run.seed", "expected --gin.NAME=VALUE"),
    flag(
        "scope misspelt in a flag", "--gin.langauge/FeatureType.rank=2",
        "no FeatureType is used in the scope 'langauge'", "'language'",
    ),
    flag("flag without effect", "--gin.Sweep.samples=3", "no Sweep is used"),
    command(
        "gin file misspelt", "train --gin_file=configs/experiments/ner_tniy.gin --run_dir=new",
        "'configs/experiments/ner_tniy.gin'", "configs/experiments/ner_tiny.gin",
    ),
    command("gin file is a folder", "train --gin_file=data --run_dir=new", "'data'"),
    command(
        "gin file is binary", "train --gin_file=m.gin --run_dir=new", "'m.gin' is not a text",
        files={"m.gin": b"\xff\xfe\x00\x01"},
    ),
    gin("include of a missing file", "include 'configs/adapters/flx.gin'", "flx.gin", "flix.gin"),
    gin("include of itself", "include 'm.gin'", "'m.gin' includes itself"),
    gin("import of a missing module", "import my_moduel", "my_moduel"),
    command(
        "required value not given", "train --gin_file=run.gin --run_dir=new", "DATA_DIR", "--gin.",
    ),
    gin("required parameter not given", "Run.total_steps = %gin.REQUIRED", "Run.total_steps"),
    command(
        "value that nothing gives", "train --gin_file=m.gin --run_dir=new", "Run.model",
        files={"m.gin": "Run.base = 'random'\n"},
    ),
)  # fmt: skip

VALUES = (
    gin("text for a number", "Run.batch_size = '8'", "Run.batch_size is '8'", "int"),
    gin("fraction for a whole number", "Run.total_steps = 4.0", "Run.total_steps is 4.0", "int"),
    gin("None for a number", "Run.keep = None", "Run.keep is None", "int"),
    gin("negative steps", "Run.total_steps = -1", "Run.total_steps must be at least 1"),
    gin("no batch", "Run.batch_size = 0", "Run.batch_size must be at least 1"),
    gin("no inputs", "Run.inputs_length = 0", "Run.inputs_length must be at least 1"),
    gin("keeps nothing", "Run.keep = 0", "Run.keep must be at least 1"),
    gin("text for patterns", "Mixture.held_out = 'up/y'", "Mixture.held_out", "('up/y',)"),
    gin("one type for a list", "FeatureSpace.types = @task/FeatureType()", "FeatureSpace.types"),
    gin("number for targets", "AdapterSpec.targets = 5", "AdapterSpec.targets"),
    gin("another class for the model", "Run.model = @Mixture()", "Run.model is @Mixture()", "T5Config"),
    gin("another class for the adapters", "Run.adapters = @FeatureSpace()", "Run.adapters", "AdapterSpec"),
    gin("another class for the optimizer", "Run.optimizer = @Schedule()", "Run.optimizer", "Optimizer"),
    gin("a text for the model", "Run.model = 'mt5_base'", "Run.model is 'mt5_base'", "T5Config"),
    gin("a text for the vocabulary", "Run.vocabulary = 'bytes'", "Run.vocabulary", "ByteVocabulary"),
    gin("a text for the source", "Run.source = 'data'", "Run.source is 'data'", "@Name()"),
    gin("a number for the base", "Run.base = 5", "Run.base is 5"),
    gin("no evaluation", "Run.evaluation = None", "Run.evaluation is None", "Evaluation"),
    gin("a transform that is none", "Run.transforms = {'up/x': 3}", "Run.transforms"),
    gin("a list for transforms", "Run.transforms = ('up/x',)", "Run.transforms"),
    gin("dtype misspelt", "T5Config.dtype = 'bfloat'", "T5Config.dtype = 'bfloat'", "bfloat16"),
    gin("dtype of the base misspelt", "Run.frozen_dtype = 'int4'", "'int4'", "int8"),
    gin("remat misspelt", "T5Config.remat = 'ful'", "'ful'", "'full'"),
    gin("activation misspelt", "T5Config.mlp_activations = ('gelo',)", "'gelo'", "'gelu'"),
    gin("dropout above 1", "T5Config.dropout_rate = 1.5", "T5Config.dropout_rate = 1.5"),
    gin("no width", "T5Config.emb_dim = 0", "T5Config.emb_dim = 0"),
    gin("odd buckets", "T5Config.relative_attention_num_buckets = 30", "num_buckets = 30"),
    gin("chunks that do not divide", "Run.loss_chunks = 4", "Run.loss_chunks = 4"),
    gin("label smoothing above 1", "Run.label_smoothing = 1.5", "Run.label_smoothing"),
    gin("negative z loss", "Run.z_loss = -1.0", "Run.z_loss"),
    gin("reading longer in vain", "Run.read_lengths = (16, 16)", "Run.read_lengths"),
    gin("packing what is noised", "Run.packing = True\nRun.transforms = {'up/x': @SpanCorruption()}\nSpanCorruption.vocabulary = @ByteVocabulary()", "Run.packing = True"),
    gin("examples of a row that is not mixed", "Run.examples_per_row = 4", "Run.examples_per_row = 4", "Run.packing = 'mixed'"),
    gin("no examples in a mixed row", "Run.packing = 'mixed'\nRun.examples_per_row = 0", "Run.examples_per_row must be at least 1", place="m.gin:3"),
    gin("lengths that cannot be halved", "Run.length_buckets = 3", "Run.length_buckets = 3: Run.targets_length = 6", "a multiple of 4"),
    gin("lengths of a side that is none", "Run.length_buckets = {'input': 2}", "'input' is none of", "'inputs'"),
    gin("lengths of packed rows", "Run.length_buckets = 2\nRun.packing = True", "Run.length_buckets = 2: Run.packing = True", "one or the other"),
    gin("packing by a word", "Run.packing = 'yes'", "Run.packing = 'yes'", "'mixed'"),
    gin("tables misspelt", "Run.tables = 'rwos'", "'rwos'", "'rows'"),
    gin("tables of a layer misspelt", "Run.tables = {'mlp': 'rwos'}", "Run.tables['mlp'] = 'rwos'", "'rows'"),
    gin("tables of no layer", "Run.tables = {'mlq/.*': 'rows'}", "Run.tables: 'mlq/.*' matches none of", place="m.gin:2"),
)  # fmt: skip

ADAPTERS = (
    gin("rank zero", "FeatureType.rank = 0", "rank is 0"),
    gin("rank as a text", "FeatureType.rank = 'four'", "FeatureType.rank is 'four'", "int"),
    gin("feature dropout above 1", "FeatureType.dropout = 2.0", "dropout is 2.0"),
    gin("what is unknown misspelt", "FeatureType.unknown = 'eror'", "'eror'", "'error'"),
    gin("combination misspelt", "FeatureType.combine = 'som'", "'som'", "'sum'"),
    gin("no slots", "FeatureType.slots = 0", "slots is 0"),
    gin("annotation misspelt", "language/FeatureType.name = 'langage'", "'langage'", "'language'"),
    gin("two types of one name", "language/FeatureType.name = 'task'", "'task'", place=""),
    gin("value twice", "task/FeatureType.values = ('up', 'up')", "'up'"),
    gin(
        "rank of an unknown value", "task/FeatureType.values = ('up',)\ntask/FeatureType.ranks = {'pu': 2}",
        "'pu'", "'up'", place="m.gin:3",
    ),
    gin(
        "value that is an error", "task/FeatureType.values = ('same',)\ntask/FeatureType.unknown = 'error'",
        "unknown value 'up'", "'same'",
    ),
    gin("target misspelt", "AdapterSpec.targets = 'atention'", "'atention'", "'attention'"),
    gin("target that matches no layer", "AdapterSpec.targets = 'encoder/.*/qery'", "qery", "query"),
    gin("target that is no pattern", "AdapterSpec.targets = '(query'", "'(query'"),
    gin("alpha zero", "AdapterSpec.alpha = 0.0", "alpha is 0.0"),
    gin("values to train misspelt", "Run.train_values = ('langage=x',)", "'langage=x'", "'language=x'"),
    gin("patterns beside adapters", "Run.trainable = ('.*/scale',)", "Run.trainable"),
    gin("fusion misspelt", "AdapterSpec.fusion = @Fusion()\nFusion.function = 'atend'", "'atend'", place="m.gin:3"),
    gin("fusion without a source", "AdapterSpec.fusion = @Fusion()", "Run.source_text"),
    gin("adapters of a missing folder", "Run.adapters_from = 'adaptres'", "adaptres"),
    gin("adapters at other layers", "Run.adapters_from = 'adapters'\nAdapterSpec.targets = 'mlp'", "targets"),
    gin("adapters of another rank", "Run.adapters_from = 'adapters'\nFeatureType.rank = 3", "rank 4"),
    gin("adapters of another network", "Run.adapters_from = 'adapters'\nT5Config.mlp_dim = 64\nRun.base = 'random'", "T5Config.mlp_dim", place="m.gin:3"),
)  # fmt: skip

CELLS = (
    gin("task misspelt", "Mixture.include = ('pu/*',)", "'pu/*'", "'up/x'"),
    gin("language unknown", "Mixture.include = ('up/z',)", "'up/z'", "'up/x'"),
    gin("cell to hold out misspelt", "Mixture.held_out = ('up/yy',)", "'up/yy'", "'up/y'"),
    gin("braces left open", "Mixture.include = ('up/{x,y',)", "'up/{x,y'"),
    gin("everything held out", "Mixture.held_out = ('*/*',)", "no cell to train on"),
    gin("nothing included", "Mixture.include = ()", "Mixture.include is empty"),
    gin("rates misspelt", "Mixture.rates = 'propotional'", "'propotional'", "'proportional'"),
    gin("negative weight", "Mixture.rates = {'*/*': -1}", "'*/*'"),
    gin("weight of an unknown cell", "Mixture.rates = {'pu/*': 1.0, '*/*': 1.0}", "'pu/*'"),
    gin("cell without a weight", "Mixture.rates = {'up/*': 1.0}", "same/x"),
    gin("cap zero", "Mixture.cap = 0", "Mixture.cap"),
    gin("temperature in vain", "Mixture.temperature = 2.0", "Mixture.temperature"),
    gin("overlap misspelt", "Mixture.overlap = 'drp'", "'drp'", "'drop'"),
    gin("split misspelt", "Evaluation.every = 2\nEvaluation.split = 'validaton'", "'validaton'", "'validation'", place="m.gin:3"),
    gin("best by an unknown number", "Evaluation.every = 2\nEvaluation.keep_best = 'mean_sen'", "'mean_sen'", "'mean_seen'", place="m.gin:3"),
    gin("best without evaluation", "Evaluation.keep_best = 'mean_seen'", "Evaluation.keep_best"),
    gin("budget below the cells", "Evaluation.every = 2\nEvaluation.examples = 1", "Evaluation.examples=1", place="m.gin:3"),
    gin("ensemble misspelt", "Evaluation.ensemble = 'weigths'", "'weigths'", "'weights'"),
    gin("transform of an unknown cell", "Run.transforms = {'pu/x': @SpanCorruption()}\nSpanCorruption.vocabulary = @ByteVocabulary()", "'pu/x'", "'up/x'"),
    gin("prompt of an unknown task", "XtremeUp.prompts = {'upp': '{input}'}", "'upp'", "'up'"),
    gin("prompt without the input", "XtremeUp.prompts = {'up': 'do {inptu}'}", "'inptu'", "'input'"),
    gin("prompt with an unknown field", "XtremeUp.prompts = {'up': '{tilte}: {input}'}", "'tilte'"),
    gin("what bad records do misspelt", "XtremeUp.on_bad_record = 'ignore'", "'ignore'", "'skip'"),
    gin("table of languages missing", "XtremeUp.languages = 'langs.tsv'", "langs.tsv"),
    gin("English sources of records without", "Run.source_text = @SourceText()", "Run.source_text"),
)  # fmt: skip

DATA = (
    flag("data folder missing", "--gin.DATA_DIR='dat'", "'dat' is not a folder", "'data'"),
    flag("data folder is a file", "--gin.DATA_DIR='run.gin'", "'run.gin' is not a folder"),
    flag("data folder without data", "--gin.DATA_DIR='trained'", "'trained' holds no data"),
    data("malformed record", {TRAINING: GOOD + '{"input": "ab", "target"}\n'}, f"{TRAINING}:2: malformed"),
    data("record without a target", {TRAINING: GOOD * 2 + '{"input": "ab"}\n'}, f"{TRAINING}:3: field 'target'"),
    data("record that is a list", {TRAINING: "[1, 2]\n" + GOOD}, f"{TRAINING}:1: expected a JSON object"),
    data("list for a text", {TRAINING: '{"input": ["ab"], "target": "A"}\n'}, f"{TRAINING}:1: field 'input'"),
    data("half a character", {TRAINING: '{"input": "\\ud800", "target": "A"}\n'}, f"{TRAINING}:1: field 'input'"),
    data("not UTF-8", {TRAINING: GOOD.encode() + b'{"input": "\xff", "target": "A"}\n'}, f"{TRAINING}:2: not UTF-8"),
    data("empty file", {TRAINING: ""}, f"{TRAINING}: the file holds no records"),
    data("compressed file", {TRAINING: b"\x1f\x8b\x08\x00" + bytes(range(128, 200)) + b"\n"}, f"{TRAINING}:1: not UTF-8"),
    data("cut in the middle", {TRAINING: GOOD + GOOD[:14]}, f"{TRAINING}:2: malformed"),
    data("folder in place of a file", {"data/up/train/z.jsonl": FOLDER}, "data/up/train/z.jsonl"),
    data("bad record of evaluation data", {"data/up/validation/y.jsonl": "x\n"}, "data/up/validation/y.jsonl:1: malformed"),
    data("file name of two languages", {"data/up/train/a,b.jsonl": GOOD}, "'a,b'"),
    data("file of entities without them", {"data/ner/train/x.jsonl": GOOD}, "data/ner/train/x.jsonl:1"),
    data(
        "all records bad", {TRAINING: "x\ny\n"}, f"{TRAINING}: none of the 2 records can be read",
        "XtremeUp.on_bad_record = 'skip'",
    ),
)  # fmt: skip

SENTENCEPIECE = "Run.vocabulary = @SentencePieceVocabulary()\nSentencePieceVocabulary.path = "
VOCABULARY = (
    gin("vocabulary file missing", SENTENCEPIECE + "'word.model'", "'word.model'", "words.model", place="m.gin:3"),
    gin("vocabulary that is no model", SENTENCEPIECE + "'run.gin'", "'run.gin' is not a SentencePiece model", place="m.gin:3"),
    gin("vocabulary cut off", SENTENCEPIECE + "'cut.model'", "'cut.model'", place="m.gin:3"),
    gin("vocabulary is a folder", SENTENCEPIECE + "'data'", "'data'", place="m.gin:3"),
    gin("vocabulary larger than the network", "ByteVocabulary.extra_ids = 200", "459 ids", place="m.gin:2"),
    gin("network smaller than the vocabulary", "T5Config.vocab_size = 256", "T5Config.vocab_size"),
    gin("fewer than no ids", "ByteVocabulary.extra_ids = -1", "extra_ids=-1"),
    gin("vocabulary of no class", "Run.vocabulary = @ByteVocabulry()", "'ByteVocabulry'", "'ByteVocabulary'"),
)  # fmt: skip

DEVICES = (
    gin("mesh that does not fit", "MeshSpec.data = 3", "Mesh(data=3"),
    gin("mesh axis of no device", "MeshSpec.fsdp = 0", "every size must be positive"),
    gin("batch that the mesh does not divide", "Run.batch_size = 12", "12 is not a positive multiple of 8"),
    gin("microbatches that do not divide", "Run.microbatches = 3", "microbatch"),
    gin("evaluation batch that does not divide", "Evaluation.batch_size = 12", "12 is not a positive multiple of 8"),
    gin("width that the mesh does not divide", "MeshSpec.model = 8\nMeshSpec.data = 1", "divisible by mesh axis 'model'"),
    gin("slices that do not divide", "MeshSpec.slices = 3", "MeshSpec.slices = 3"),
    gin("rule over an unknown axis", "AxisRules.parameters = (('embed', 'fdsp'),)", "'fdsp'", "'fsdp'"),
    gin("rule of an unknown dimension", "AxisRules.parameters = (('embd', 'fsdp'),)", "'embd'", "'embed'"),
)  # fmt: skip

SCHEDULE = (
    gin("warm-up beyond the end", "Schedule.warmup_steps = 10", "Schedule.warmup_steps 10"),
    gin("schedule misspelt", "Schedule.kind = 'cosin'", "'cosin'", "'cosine'"),
    gin("learning rate zero", "Schedule.learning_rate = 0.0", "Schedule.learning_rate"),
    gin("learning rate infinite", "Schedule.learning_rate = 1e999", "Schedule.learning_rate"),
    gin("optimizer misspelt", "Optimizer.name = 'adam'", "'adam'", "'adamw'"),
    gin("negative weight decay", "Optimizer.weight_decay = -0.1", "Optimizer.weight_decay"),
    gin("clipping to nothing", "Optimizer.clip_norm = 0.0", "Optimizer.clip_norm"),
    gin("b1 above 1", "Optimizer.b1 = 1.5", "Optimizer.b1"),
    gin("b2 as 1", "Optimizer.b2 = 1.0", "Optimizer.b2"),
    gin("more than the disk holds", "Run.base = 'random'\nRun.adapters = None\nT5Config.mlp_dim = 2147483647\nT5Config.emb_dim = 1048576", "Run.keep", place=""),
    gin("eps zero", "Optimizer.eps = 0.0", "Optimizer.eps"),
    gin("lazy Adafactor", "Optimizer.lazy = True\nOptimizer.name = 'adafactor'", "Optimizer.lazy", "adamw"),
    gin("lazy training of all parameters", "Optimizer.lazy = True\nRun.base = 'random'\nRun.adapters = None", "Optimizer.lazy", "base/Optimizer.lazy = False", place=""),
    gin("lazy by a word", "Optimizer.lazy = 'always'", "Optimizer.lazy"),
    gin("evaluation every 0 steps", "Evaluation.every = 0", "Evaluation.every"),
)  # fmt: skip

FROM_HF = {"m.gin": INCLUDE + "Run.base = 'hf'\n"}
BASES = (
    gin("base folder missing", "Run.base = 'bse'", "bse", "'base'"),
    gin("base that holds nothing", "Run.base = 'data'", "data holds no trained run"),
    gin("base that is a file", "Run.base = 'run.gin'", "run.gin holds no trained run"),
    gin("base of another width", "T5Config.emb_dim = 32", "model.emb_dim is 16 there and 32 here"),
    gin("base that saw what is held out", "Mixture.held_out = ('up/x',)", "up/x"),
    gin("base of a run with adapters", "Run.base = 'trained'", "trained adapters alone"),
    gin("base with another vocabulary", "ByteVocabulary.extra_ids = 100", "vocabulary.extra_ids is 125 there and 100 here"),
    gin("network of another shape", "Run.base = 'hf'\nT5Config.mlp_dim = 64", "[16, 32] there, [16, 64] here"),
    gin("network of other heads", "Run.base = 'hf'\nT5Config.num_heads = 1\nT5Config.head_dim = 16", "T5Config.num_heads = 1", place="m.gin:3"),
    gin("network of fewer layers", "Run.base = 'hf'\nT5Config.num_encoder_layers = 2", "encoder/layers_1"),
    gin("T5X's network of another shape", "Run.base = 't5x'\nT5Config.mlp_dim = 64", "[16, 32] there, [16, 64] here"),
    Mistake("network cut off", CHECK, "hf/model.safetensors", files={**FROM_HF, "hf/model.safetensors": CUT}),
    Mistake("network of another family", CHECK, "model_type is 'bert'", "t5", files={**FROM_HF, "hf/config.json": '{"model_type": "bert"}'}),
    Mistake("network with a broken config", CHECK, "hf/config.json", files={**FROM_HF, "hf/config.json": '{"model_type": '}),
    Mistake("T5X's checkpoint cut off", CHECK, "old/checkpoint", files={"m.gin": INCLUDE + "Run.base = 'old'\n", "old/checkpoint": b"\x82\xa7version\x03"}),
    gin("base of cells with several sets of features", TWO_STAGES.replace("None", "@AdapterSpec()"), "Run.base has adapters"),
    gin("base of another vocabulary", TWO_STAGES + "base/Run.vocabulary = @other/ByteVocabulary()\nother/ByteVocabulary.extra_ids = 100", "Run.base has another vocabulary"),
    gin("base that is trained for too short a warm-up", TWO_STAGES + "Schedule.warmup_steps = 3", "Schedule.warmup_steps 3", place="m.gin:6"),
    gin("base with a batch that cannot be", TWO_STAGES + "base/Run.batch_size = 12", "12 is not a positive multiple", place="m.gin:6"),
)  # fmt: skip

FOLDERS = (
    command("run folder is a file", TRAIN.replace("new", "run.gin/x"), "run.gin", files={"m.gin": INCLUDE}),
    command("run folder below a file", TRAIN.replace("new", "run.gin/runs/x"), "run.gin", files={"m.gin": INCLUDE}),
    command("run folder without permission", TRAIN.replace("new", "/proc/new"), "/proc", files={"m.gin": INCLUDE}),
    gin("folder of another rank", "FeatureType.rank = 2", "rank is 4 there and 2 here", line=GOES_ON),
    gin("folder of another learning rate", "Schedule.learning_rate = 0.5", "optimizer.schedule.learning_rate", "--allow_changes", line=GOES_ON),
    gin("folder of another batch size", "Run.batch_size = 16", "batch_size is 8 there and 16 here", "the sequence of examples", line=GOES_ON),
    gin("folder of features in another order", "FeatureSpace.types = (@language/FeatureType(), @task/FeatureType())", "'task' there and 'language' here", line=GOES_ON),
    gin("folder of other cells", "Mixture.exclude = ('same/y',)", "mixture.exclude", line=GOES_ON),
    gin("changes that cannot be", "FeatureType.rank = 2", "rank", line=GOES_ON + " --allow_changes=*"),
    gin("allowed change misspelt", "Schedule.learning_rate = 0.5", "'optimizer.schedule.learning_rat'", "'optimizer.schedule.learning_rate'", place="", line=GOES_ON + " --allow_changes=optimizer.schedule.learning_rat"),
    gin("another change than is allowed", "Schedule.learning_rate = 0.5\nOptimizer.b1 = 0.5", "optimizer.b1", "--allow_changes", place="m.gin:3", line=GOES_ON + " --allow_changes=optimizer.schedule.*"),
    Mistake("folder with a broken record", GOES_ON, "trained/run.json", files={"m.gin": INCLUDE, "trained/run.json": '{"kind": '}),
    Mistake("folder without its record", GOES_ON, "trained/run.json is missing", files={"m.gin": INCLUDE, "trained/run.json": GONE}),
    gin("fewer steps than were made", "Run.total_steps = 3", "Run.total_steps = 3", "step 4", line=GOES_ON),
    Mistake("records changed since", GOES_ON, "other training data", files={"m.gin": INCLUDE + "Run.total_steps = 6\n", TRAINING: GOOD * 7}),
)  # fmt: skip

FLAGS = (
    command("command misspelt", "trian", "'trian'", "'train'"),
    command("command of a command misspelt", "data decribe", "'data decribe'", "'describe'"),
    command("flag misspelt", "train --run_dri=new", "--run_dri", "'--run_dir'"),
    command("flag of another command", "evaluate --run_dir=trained --dry_run", "--dry_run"),
    command("no run folder", "train --gin_file=run.gin", "--run_dir"),
    command("empty run folder", "train --gin_file=run.gin --run_dir=", "--run_dir", "expected a folder"),
    command("empty run folder to check", "check --gin_file=run.gin --run_dir=", "--run_dir", "expected a folder"),
    command("no gin file", "train --run_dir=new", "--gin_file"),
    command("a word too many", "train --gin_file=run.gin --run_dir=new more", "more"),
    command("steps that are none", "train --gin_file=run.gin --run_dir=new --profile=3", "--profile"),
    flag("steps beyond the end", "--profile=5:9", "--profile=5:9"),
    command("process without others", "train --gin_file=run.gin --run_dir=new --processes=2", "--coordinator"),
    command("process that there is not", "train --gin_file=run.gin --run_dir=new --coordinator=localhost:1 --processes=2 --process=2", "--process=2"),
    command("gin flag where there is none", "report --run_dir=trained --gin.X=1", "--gin.X=1"),
    command("evaluation of no run", "evaluate --run_dir=data", "data holds no run"),
    command("evaluation of a folder that is missing", "evaluate --run_dir=trianed", "trianed holds no run"),
    command("evaluation split misspelt", "evaluate --run_dir=trained --split=tset", "'tset'"),
    command("evaluation of an unknown cell", "evaluate --run_dir=trained --cells=up/xx", "'up/xx'", "'up/x'"),
    command("evaluation of a missing step", "evaluate --run_dir=trained --step=3", "step 3"),
    command("evaluation of a step that is none", "evaluate --run_dir=trained --step=last", "'last'"),
    command("best step of a run that keeps none", "evaluate --run_dir=trained --step=best", "Evaluation.keep_best"),
    command("confidence in per cent", "evaluate --run_dir=trained --confidence=95", "95"),
    command("report of no sweep", "report --run_dir=trained", "trained"),
    command("submission of tasks of one's own", "submission --run_dir=trained --out=sub --split=validation", "same, up"),
    command("description of two things", "data describe --data_dir=data --gin_file=run.gin", "either"),
    command("description of a missing folder", "data describe --data_dir=dta", "'dta'", "'data'"),
    command("description of an unknown cell", "data describe --data_dir=data --cells=upp/x", "'upp/x'", "'up/x'"),
    command("topology of an unknown kind", "plan --gin_file=run.gin --gin.DATA_DIR='data' --topology=v5x:4x4", "'v5x'", "'v5e'"),
    command("topology without shape", "plan --gin_file=run.gin --gin.DATA_DIR='data' --topology=v5e", "'v5e'"),
    command("launch by an unknown engine", "launch --engine=slrum --gin_file=run.gin --run_dir=new", "'slrum'"),
    command("launch without an engine", "launch --gin_file=run.gin --run_dir=new", "--engine"),
    command("check of no gin file", "check", "--gin_file"),
)  # fmt: skip

INPUTS = (
    command("input missing", INFER, "in.jsonl"),
    command("input is a folder", INFER.replace("in.jsonl", "data"), "data"),
    command("no run to infer with", INFER.replace("trained", "data"), "data holds no run", files={"in.jsonl": ASKED}),
    infer("input malformed", ASKED + "{\n", "in.jsonl:2: malformed"),
    infer("input without its text", '{"text": "ab", "task": "up"}\n', "in.jsonl:1: expected a text in the field 'input'"),
    infer("input not UTF-8", b'{"input": "\xff"}\n', "in.jsonl:1: not UTF-8"),
    infer("input empty", "", "in.jsonl"),
    infer("input of no known feature", '{"input": "ab", "language": "zz"}\n', "in.jsonl:1: no known feature"),
    infer("weight that is none", '{"input": "ab", "language": {"x": "much"}}\n', "in.jsonl:1: weight 'much'"),
    infer("feature type misspelt", ASKED, "'langage'", "'language'", "--features=langage=x"),
    infer("feature value unknown", ASKED, "'xx' is no language", "'x'", "--features=language=xx"),
    infer("feature without a value", ASKED, "'language'", more="--features=language"),
    infer("feature twice", ASKED, "language=x", more="--features=language=x,language=x"),
    infer("override of nothing", ASKED, "override", more="--override"),
    infer("form misspelt", ASKED, "'json'", "jsonl", "--input_form=json"),
    infer("no beams", ASKED, "beams", more="--beams=0"),
    infer("beams and sampling", ASKED, "sampling", more="--beams=2 --sampling"),
    infer("nucleus above 1", ASKED, "top_p", more="--sampling --top_p=2"),
    infer("temperature of no drawing", ASKED, "temperature", more="--temperature=2"),
    infer("folding of several sets", ASKED + ASKED.replace('"x"', '"y"'), "2 sets of features", more="--fold=always"),
    infer("output is a folder", ASKED, "data", more="--output=data"),
    command("export format misspelt", "export --run_dir=trained --out=out --format=hugingface", "'hugingface'"),
    command("export into a folder that is not empty", "export --run_dir=trained --out=data --format=flix", "data: is there already"),
    command("export of no features", "export --run_dir=trained --out=out --format=peft", "--features"),
    command("export of an unknown feature", "export --run_dir=trained --out=out --format=peft --features=language=q", "'q' is no language"),
    command("family misspelt", "export --run_dir=trained --out=out --format=t5x --family=mt5 --features=language=x", "family 'mt5'"),
    command("conversion of nothing", "convert --from=data --out=out --format=t5x", "data"),
    command("conversion of what is missing", "convert --from=hff --out=out --format=t5x", "hff", "'hf'"),
    command("feature that is there", "features add language=x --from=adapters --out=out", "language=x"),
    command("feature of an unknown type", "features add langage=z --from=adapters --out=out", "'langage'", "'language'"),
    command("start misspelt", "features add language=z --from=adapters --out=out --init=meen", "'meen'", "'mean'"),
    command("start from an unknown value", "features add language=z --from=adapters --out=out --init=copy:q", "'q'"),
    command("feature that is not there", "features remove language=q --from=adapters --out=out", "'q'"),
    command("union of one", "features merge --from=adapters --out=out", "two or more"),
    command("adapters of no folder", "features list --from=data", "data holds no adapters"),
)  # fmt: skip

SWEEPS = (
    gin("axis of an unknown parameter", SWEEPING + "Sweep.axes = {'FeatureType.rnak': (1, 2)}", "'rnak'", "'rank'", line=SWEEP, place=""),
    gin("axis without values", SWEEPING + "Sweep.axes = {'FeatureType.rank': ()}", "'FeatureType.rank'", line=SWEEP, place="m.gin:5"),
    gin("axis with a value that cannot be", SWEEPING + "Sweep.axes = {'FeatureType.rank': (1, 0)}", "rank is 0", line=SWEEP, place=""),
    gin("axis with a mesh that cannot be", SWEEPING + "Sweep.axes = {'Run.batch_size': (8, 12)}", "12 is not a positive multiple", line=SWEEP, place=""),
    gin("axis with targets that match nothing", SWEEPING + "Sweep.axes = {'AdapterSpec.targets': ('all', 'atention')}", "'atention'", "'attention'", line=SWEEP, place=""),
    gin("binding without a value", SWEEPING + "Sweep.axes = {'rank': {'1': 'FeatureType.rank'}}", "'FeatureType.rank'", line=SWEEP, place="m.gin:5"),
    gin("metric misspelt", SWEEPING + "Sweep.metric = 'exact_mach'", "'exact_mach'", "'exact_match'", line=SWEEP, place="m.gin:5"),
    gin("group misspelt", SWEEPING + "Sweep.group = 'unsen'", "'unsen'", "'unseen'", line=SWEEP, place="m.gin:5"),
    gin("seeds twice", SWEEPING + "Sweep.seeds = (0, 0)", "distinct seeds", line=SWEEP, place="m.gin:5"),
    gin("choice of an unknown axis", SWEEPING + "Sweep.choose = ('rank',)", "'rank'", line=SWEEP, place="m.gin:5"),
    gin("draws without a number", SWEEPING + "Sweep.samples = 3", "Sweep.samples", line=SWEEP, place="m.gin:5"),
    gin("split to report misspelt", SWEEPING + "Sweep.report_on = 'tets'", "'tets'", line=SWEEP, place=""),
    gin("worker of none", SWEEPING, "--worker=3/2", line=SWEEP + " --worker=3/2", place=""),
    gin("no sweep in the file", "", "Sweep.name", line=SWEEP, place=""),
    gin("seed that no run reads", "Sweep.name = 'x'\nSweep.seeds = (0, 1)", "SEED", line=SWEEP, place=""),
)  # fmt: skip

GROUPS: Mapping[str, tuple[Mistake, ...]] = {
    "names in gin files": NAMES,
    "values in gin files": VALUES,
    "features and adapters": ADAPTERS,
    "cells and evaluation": CELLS,
    "data files": DATA,
    "vocabulary": VOCABULARY,
    "devices": DEVICES,
    "optimizer and schedule": SCHEDULE,
    "base": BASES,
    "run folders": FOLDERS,
    "flags": FLAGS,
    "inputs and exports": INPUTS,
    "sweeps": SWEEPS,
}
MISTAKES = tuple(mistake for group in GROUPS.values() for mistake in group)


def make_world(folder: pathlib.Path) -> None:
    """Data, gin files, a trained run and its base, exported adapters, a network, a vocabulary.

    To be called in `folder`.
    """
    import sentencepiece

    from flix_jax import cli

    write_gin(folder, run=CONFIG.partition("Run.base =")[0] + "Run.base = 'base'\n")
    (folder / "base.gin").write_text(
        INCLUDE + "Run.base = 'random'\nRun.adapters = None\nRun.total_steps = 2\n"
    )
    text = folder / "words.txt"
    text.write_text("".join(f"{word} {word[::-1]}\n" for word in ("ab", "cab", "cc", "abc") * 9))
    sentencepiece.SentencePieceTrainer.Train(
        input=str(text), model_prefix=str(folder / "words"), vocab_size=14, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    whole = (folder / "words.model").read_bytes()
    (folder / "cut.model").write_bytes(whole[: len(whole) // 2])
    for line in (
        "train --gin_file=base.gin --gin.DATA_DIR='data' --run_dir=base",
        "train --gin_file=run.gin --gin.DATA_DIR='data' --run_dir=trained",
        "export --run_dir=trained --out=adapters --format=flix",
        "export --run_dir=trained --out=hf --format=huggingface --features=task=up,language=x",
        "convert --from=hf --out=t5x --format=t5x",
    ):
        assert cli.main(line.split()) == 0, line


@contextlib.contextmanager
def made(mistake: Mistake, folder: pathlib.Path) -> Iterator[None]:
    """The world with a mistake's files in it; as it was, afterwards."""
    kept: dict[pathlib.Path, bytes | None] = {}
    fresh: list[pathlib.Path] = []
    try:
        for name, content in mistake.files.items():
            path = folder / name
            for parent in reversed(path.parents):
                if not parent.exists():
                    parent.mkdir()
                    fresh.append(parent)
            kept[path] = path.read_bytes() if path.exists() else None
            if content == FOLDER:
                path.mkdir()
            elif content == GONE:
                path.unlink()
            elif content == CUT:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            else:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
        yield
    finally:
        for path, before in kept.items():
            if before is not None:
                path.write_bytes(before)
            elif path.is_dir():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
        for parent in reversed(fresh):
            parent.rmdir()


def contents(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file, and the folders, by path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.stat()
        found[str(path.relative_to(folder))] = (
            (-1, 0) if path.is_dir() else (about.st_size, about.st_mtime_ns)
        )
    return found


def faults(mistake: Mistake, status: int, told: str) -> list[str]:
    """What is wrong with the answer to a mistake; nothing where it is as it should be."""
    found = [] if status == 2 else [f"exit status {status}"]
    lines = [line for line in told.splitlines() if not line.startswith("warning: ")]
    if len(lines) != 1:
        found.append(f"{len(lines)} lines")
    elif not lines[0].startswith("error: "):
        found.append("no error: in front")
    if "Traceback" in told:
        found.append("a traceback")
    for what in ("culprit", "near", "place"):
        if getattr(mistake, what) not in told:
            found.append(f"no {what} {getattr(mistake, what)!r}")
    return found
