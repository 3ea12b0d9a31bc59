"""A pretrained decoder from Hugging Face as a trunk, if it can carry rows of blocks.

    load_trunk(config, parents, about)  its weights, tested before anybody trains on them
    trunk_tokenizer(config)             its tokenizer, with its template

`--trunk=` names a hub id, a folder as the hub has them, or a .gguf file; weights are safetensors or
GGUF, and no code of a repository is run. Releases of transformers differ in what they make of a
block mask, so each model shows at load that it honours ours (`self_test`) or is refused.
"""

import inspect

import torch
import torch.nn as nn

from config import Config, fail
from model import PAD, Trunk, block_causal_mask, embed_tokens, pred_table, visible_blocks
from plumbing.cache import KVCache
from plumbing.hf_files import (
    empty_model,
    find_source,
    quietly,
    read_model,
    refuse_too_short,
    transformers,
)
from plumbing.hf_tokenizer import NEEDS, HFTokenizer, read_tokenizer
from plumbing.tables import first_line

FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")
TOLERANCE = 1e-4  # of the self-test, of the largest hidden state or logit where that is above 1


def trunk_tokenizer(config: Config) -> HFTokenizer:
    """The tokenizer of config.trunk."""
    source = find_source(config)
    try:
        with quietly():
            found = transformers.AutoTokenizer.from_pretrained(**source.where())
            about = transformers.AutoConfig.from_pretrained(**source.where())
    except Exception as error:  # missing, damaged, of an unknown kind
        fail(f"trunk={config.trunk}: its tokenizer cannot be read: {first_line(error)}")
    V = about.get_text_config().vocab_size
    return read_tokenizer(found, config.template, V, source.name)


# --- the trunk --------------------------------------------------------------------------------


class GrowingCache(transformers.DynamicCache):
    """Our key/value cache, in which a batch may lose rows, where transformers expects its own."""

    def __init__(self):
        super().__init__()
        self.kv = KVCache()
        self.resize = self.kv.resize

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return self.kv[layer_idx].append(key_states, value_states)

    def get_seq_length(self, layer_idx=0):
        return self.kv[layer_idx].n


class PretrainedTrunk(Trunk):
    """A causal language model of transformers, with [PRED] embeddings outside its vocabulary."""

    def __init__(self, lm, parents, config: Config, about: dict[str, str]):
        super().__init__(parents)
        self.lm, self.about, self.config = lm, about, lm.config.get_text_config()
        self.width, self.longest_path = self.config.hidden_size, config.block_size
        self.vocab_size = self.n_drawn = self.table.num_embeddings
        self.pred = pred_table(config.n_pred, self.table.embedding_dim)
        # Releases of transformers name it either way.
        named = inspect.signature(lm.base_model.forward).parameters
        self.cache_name = "cache" if "cache" in named else "past_key_values"

    @property
    def table(self) -> nn.Embedding:
        return self.lm.get_input_embeddings()

    def init_pred(self) -> None:
        """[PRED] as one more row of the table: its mean and spread, channel by channel. Near zero,
        a norm right behind them would give them enormous gradients."""
        if self.pred is not None:
            rows = self.table(torch.arange(self.vocab_size))  # some models scale what they read
            drawn = torch.randn_like(self.pred.weight)
            self.pred.weight.data = rows.mean(0) + rows.std(0) * drawn

    def embed(self, idx):
        return embed_tokens(idx, self.table, self.pred)

    def layers(self, x, position_ids, attn_mask, cache=None, read=None, streams=None):
        out = self.lm.base_model(
            inputs_embeds=x, attention_mask=attn_mask[:, None], position_ids=position_ids,
            use_cache=cache is not None, output_hidden_states=streams is not None,
            **({} if cache is None else {self.cache_name: cache}),
        )  # fmt: skip
        if streams is not None:
            norms = [getattr(self.lm.base_model, name, None) for name in FINAL_NORMS]
            norm = next(filter(None, norms), nn.Identity())
            streams.extend(norm(entering) for entering in out.hidden_states[:-1])
        return out.last_hidden_state if read is None else out.last_hidden_state[read]

    def logits(self, hidden):
        logits = self.lm.get_output_embeddings()(hidden)
        logits = logits * (getattr(self.config, "logit_scale", None) or 1)
        logits = logits / (getattr(self.config, "logits_scaling", None) or 1)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    def new_cache(self):
        return GrowingCache()

    def trained(self):
        """All weights or, with adapters, those and [PRED]."""
        parameters = self.named_parameters(remove_duplicate=False)  # a tied one by both its names
        frozen = {name for name, p in parameters if not p.requires_grad}
        return {k: v for k, v in self.state_dict().items() if not frozen or k not in frozen}

    def load_trained(self, state):
        missing = self.trained().keys() ^ state.keys()
        if missing:
            raise RuntimeError(f"other weights: {', '.join(sorted(missing)[:3])}")
        self.load_state_dict(state, strict=False)
        self_test(self, self.about["name"])

    def merged(self) -> "PretrainedTrunk":
        """Itself, with the adapters added into the weights that they stood beside."""
        for name, layer in [(n, m) for n, m in self.lm.named_modules() if hasattr(m, "lora_A")]:
            layer.merge()
            self.lm.set_submodule(name, layer.get_base_layer())
        return self.requires_grad_(True)

    def flops(self, batch, read):
        """As Trunk.flops; the table is looked up, not multiplied by, and labels alone are read."""
        tables = {id(p) for p in (self.table.weight, self.lm.get_output_embeddings().weight)}
        layers = (p for p in self.lm.parameters() if p.dim() > 1 and id(p) not in tables)
        weights = sum(p.numel() for p in layers)
        (B, T), C, n = batch.idx.shape, self.width, self.config.num_hidden_layers
        n_labels = 0 if batch.targets is None else (batch.targets != -1).sum().item()
        return 2 * B * T * (weights + 2 * n * T * C) + 2 * C * self.vocab_size * n_labels


# --- loading ----------------------------------------------------------------------------------


def load_trunk(config: Config, parents, about: dict[str, str] | None = None) -> PretrainedTrunk:
    """The trunk that config names. `about` is a checkpoint's, which will bring all weights, or has
    adapters and needs the base that they were trained on."""
    if about and not config.lora_rank:
        lm = empty_model(about["config"])  # not tested yet: load_trained brings the weights
        trunk = PretrainedTrunk(lm, parents, config, about)
    else:
        source = find_source(config)
        (lm, found), name = read_model(source, config.trunk), source.name
        if about and about["sha256"] != found["sha256"]:
            fail(f"trunk={config.trunk}: the adapters were trained on {about['name']} "
                 f"{about['sha256'][:12]}, here is {name} {found['sha256'][:12]}: another base")
        about = {**found, "name": name, "revision": source.revision}
        trunk = PretrainedTrunk(lm, parents, config, about)
        trunk.init_pred()
        self_test(trunk, name)
        print(f"trunk {name} ({lm.config.model_type}), sha256 {about['sha256'][:12]}: it honours "
              "the block mask")
    refuse_too_short(trunk.config, config.block_size, about["name"])
    if config.lora_rank:
        add_adapters(trunk, config, about["name"])
    if config.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return trunk


def add_adapters(trunk: PretrainedTrunk, config: Config, name: str) -> None:
    """LoRA (arXiv 2106.09685) in the linear layers, everything else but [PRED] frozen."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        fail(NEEDS.format("peft, for lora_rank"))
    modules = config.lora_modules.split(",") if config.lora_modules else "all-linear"
    lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=modules)
    try:
        inject_adapter_in_model(lora, trunk.lm)
    except ValueError as error:
        fail(f"lora_modules={config.lora_modules} match nothing in {name}: {first_line(error)}")
    for key, p in trunk.lm.named_parameters():
        p.requires_grad = "lora_" in key


# --- what a model must show -------------------------------------------------------------------


@torch.no_grad()
def self_test(trunk: PretrainedTrunk, name: str) -> None:
    """Exit unless the model, in fp32 and without dropout, makes of a row of blocks what it makes of
    its paths one by one, lets no token see more or less than the mask says, and has our logits."""
    was_training = trunk.training
    try:
        wrong = fault_of(trunk.eval())
    except Exception as error:  # it takes no embeddings, no 4-D mask, no positions, ...
        wrong = f"it does not take a row of blocks ({first_line(error)[:160]})"
    trunk.train(was_training)
    if wrong:
        fail(f"{name} cannot be a trunk (model type {trunk.lm.config.model_type}): {wrong}")


def fault_of(trunk: PretrainedTrunk) -> str:
    """What the model makes wrong of a made-up row [q q q q a a a P t t t .]; empty if nothing."""
    V, k = trunk.vocab_size, 0 if trunk.pred is None else trunk.pred.num_embeddings
    if trunk.config.vocab_size != V:
        return f"its table has {V} rows, its vocabulary {trunk.config.vocab_size} tokens"
    if getattr(trunk.config, "attn_logit_softcapping", None):
        return "its attention caps its scores, which sdpa leaves out without a word"
    block = torch.tensor([1] * 4 + [2] * 3 + [4] * k + [3] * 3 + [PAD])
    idx = torch.randint(V, block.shape, generator=torch.Generator().manual_seed(0))
    idx[block == 4] = V + torch.arange(k)
    idx, block = idx.to(trunk.device), block.to(trunk.device)
    sees = visible_blocks((None, None, 1, None, 1)).to(trunk.device)
    attn_mask, position_ids = block_causal_mask(block[None], sees)

    def packed(rows):  # (B, T) -> (B, T, C)
        n = len(rows)
        return trunk.layers(trunk.embed(rows), position_ids.expand(n, -1),
                            attn_mask.expand(n, -1, -1))  # fmt: skip

    def near(x, y):  # False for nan
        return (x - y).abs().max().item() <= TOLERANCE * max(1.0, y.abs().max().item())

    hidden = packed(idx[None])[0]
    for path in ((1, 2), (1, 4), (3,)):
        at = torch.isin(block, torch.tensor(path, device=block.device))
        alone = trunk.lm.base_model(inputs_embeds=trunk.embed(idx[None, at])).last_hidden_state[0]
        if not near(hidden[at], alone):
            return "a row of blocks gives other hidden states than its paths alone"
    T = len(block)  # now change each token in turn: who sees it?
    other = torch.where(torch.eye(T, device=idx.device) == 1, (idx + 1) % V, idx)
    moved = (packed(other) - hidden).abs().amax(-1)  # (changed token, position)
    seen = attn_mask[0].T
    if not moved[~seen].max() <= TOLERANCE * max(1.0, hidden.abs().max().item()):
        return "a token sees what the mask hides from it"
    if not moved[seen].all():
        return "a token does not see what the mask shows it"
    words = idx[None, block < 3]
    if not near(trunk.logits(trunk.lm.base_model(input_ids=words).last_hidden_state),
                trunk.lm(input_ids=words).logits):  # fmt: skip
        return "its logits are not those of its output layer with the scales and caps that we know"
    return ""
