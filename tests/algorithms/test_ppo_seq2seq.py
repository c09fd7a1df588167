"""PPO on encoder-decoders: what is not already tested for every kind of policy in the other files."""

import math

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from elastic_lightning.algorithms import PPO, Execution
from elastic_lightning.callbacks import ElasticReset
from elastic_lightning.errors import UserError
from elastic_lightning.policies import ModelSource, PairedTexts, Prompts, Responses

EPS = 1e-4  # of Adam: a gradient that is only rounding must not become a step of full size


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.actor.named_parameters()}


def sinusoids(module):
    """Marian's positions: parameters that are constants."""
    names = {f"model.model.{half}.embed_positions.weight" for half in ("encoder", "decoder")}
    return names if module.actor.lm.config.model_type == "marian" else set()


@torch.no_grad()
def plain_logits(model, prompt, response):
    """Logits [T, V] that predict the response, by the model's own forward on one row."""
    before = torch.tensor([[model.config.decoder_start_token_id, *response[:-1]]])
    return model(input_ids=torch.tensor([prompt]), decoder_input_ids=before).logits[0]


def pairs(toy, rows=5):
    """Human pairs: prompts, and targets of unlike lengths that end."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.tensor([2 + row % 4 for row in range(rows)])
    tokens = torch.randint(0, 27, (rows, 5), generator=generator)
    tokens[torch.arange(rows), lengths - 1] = toy.eos
    mask = torch.arange(5) < lengths[:, None]
    return PairedTexts(toy.prompts(rows=rows, seed=3), Responses(tokens.masked_fill(~mask, toy.pad), mask))


def test_both_halves_take_part_and_the_reference_is_theta_0(seq2seq_toy):
    module = seq2seq_toy.ppo()
    shadowed, start = module.shadowed_parameters(), dict(seq2seq_toy.plain_model().named_parameters())
    assert set(shadowed) == {f"model.{name}" for name in start} - sinusoids(module)
    reference = module.reference_weights()
    assert reference.keys() == shadowed.keys()
    assert all(torch.equal(weight, start[name.removeprefix("model.")]) for name, weight in reference.items())
    assert all(weight.data_ptr() != shadowed[name].data_ptr() for name, weight in reference.items())


@pytest.mark.parametrize("lora", [False, True])
def test_elastic_reset_is_its_arithmetic(seq2seq_toy, tmp_path, lora):
    """Batch 1, reset: online <- half way from theta_0; batch 2, reset: the same from where that led."""
    options = {"lora": lora, "learning_rate": 1e-2, "adam_eps": EPS}
    batches = [seq2seq_toy.prompts(seed=seed) for seed in range(2)]
    free = seq2seq_toy.ppo(**options)
    start = {name: weight.clone() for name, weight in free.shadowed_parameters().items()}
    seq2seq_toy.fit(free, tmp_path, batches[:1])
    moved = free.shadowed_parameters()

    module = seq2seq_toy.ppo(**options)
    callback = ElasticReset(every=1, decay=0.5, update_on="batch")
    seq2seq_toy.fit(module, tmp_path, batches[:1], callbacks=[callback])
    for name, weight in module.shadowed_parameters().items():
        torch.testing.assert_close(weight, (start[name] + moved[name]) / 2, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(callback.ema[name], start[name])
    largest = max((weight - start[name]).abs().max() for name, weight in module.shadowed_parameters().items())
    assert callback.resets == 1 and largest > 1e-3
    assert torch.equal(module.actor.value_head.weight, free.actor.value_head.weight), "the value head is left alone"
    if not lora:
        assert all(torch.equal(weight, start[name]) for name, weight in module.reference_weights().items())


def test_a_value_trunk_of_its_own_learns_and_the_reference_stays(seq2seq_toy, tmp_path):
    module = seq2seq_toy.ppo(separate_value_trunk=True, learning_rate=1e-2)
    before = weights(module)
    reference = {name: p.clone() for name, p in module.reference.lm.named_parameters()}
    seq2seq_toy.fit(module, tmp_path, [seq2seq_toy.prompts(seed=seed) for seed in range(2)])
    moved = [name for name, p in module.actor.named_parameters() if not torch.equal(p, before[name])]
    for half in (".encoder.", ".decoder."):
        assert {name.split(".")[0] for name in moved if half in name} == {"lm", "value_trunk"}
    assert all(torch.equal(p, reference[name]) for name, p in module.reference.lm.named_parameters())


def test_a_rollout_in_bfloat16_is_recomputed(seq2seq_toy, tmp_path):
    module = seq2seq_toy.ppo(execution=Execution(rollout_dtype="bfloat16"), learning_rate=1e-2)
    trainer = seq2seq_toy.fit(module, tmp_path, [seq2seq_toy.prompts(rows=8)])
    assert {p.dtype for p in module.rollout_copy.parameters()} == {torch.bfloat16}
    assert trainer.callback_metrics["train/first_ratio_deviation"] < 1e-5
    assert 1e-4 < trainer.callback_metrics["train/rollout_ratio_deviation"] < 0.5


@pytest.mark.parametrize("execution", [Execution(gradient_checkpointing=True), Execution(scoring_batch_size=2)])
def test_less_memory_changes_nothing(seq2seq_toy, tmp_path, execution):
    """Under gradient checkpointing layers are in training mode, and these have dropout rates of their own."""
    ends = []
    for each in (Execution(), execution):
        module = seq2seq_toy.ppo(execution=each, adam_eps=EPS, micro_batch_size=3)
        trainer = seq2seq_toy.fit(module, tmp_path, [seq2seq_toy.prompts(rows=7)])
        assert trainer.callback_metrics["train/first_ratio_deviation"] < 1e-5
        ends.append(weights(module))
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, atol=3e-6, rtol=0)


def test_a_policy_that_is_unknown_to_an_option_is_refused(seq2seq_toy):
    with pytest.raises(UserError, match="trainable_layers is for decoder-only models"):
        seq2seq_toy.ppo(execution=Execution(trainable_layers=1))


def test_prompts_and_responses_have_a_context_each(encoder_decoder_toys, tmp_path):
    toy = encoder_decoder_toys["marian"]
    toy.fit(toy.ppo(sampling={"max_new_tokens": 40}), tmp_path, [toy.prompts(length=40)])
    with pytest.raises(UserError, match=r"responses of 41 tokens .* context is 40"):
        toy.fit(toy.ppo(sampling={"max_new_tokens": 41}), tmp_path)
    with pytest.raises(UserError, match=r"prompts of 41 tokens .* context is 40"):
        toy.fit(toy.ppo(), tmp_path, [toy.prompts(length=41)])


# Checkpoints and folders


@pytest.mark.parametrize(
    ("kind", "options"), [("marian", {}), ("bart", {"lora": True}), ("t5", {"separate_value_trunk": True})]
)
def test_a_resumed_run_is_the_run(encoder_decoder_toys, tmp_path, kind, options):
    toy = encoder_decoder_toys[kind]
    batches = [toy.prompts(seed=seed) for seed in range(2)]
    whole = toy.ppo(**options)
    toy.fit(whole, tmp_path, batches, max_epochs=2)
    half = toy.ppo(**options)
    trainer = toy.trainer(tmp_path, max_epochs=2)
    half.on_train_epoch_end = lambda: setattr(trainer, "should_stop", True)
    trainer.fit(half, toy.loader(batches))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    names = set(torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"])
    for part in ("value_head", "lm.model", ".encoder.", ".decoder."):
        assert any(part in name for name in names)
    assert not names & {f"actor.lm.{name}" for name in sinusoids(half)}
    resumed = toy.ppo(**options, head_noise=0.9)
    trainer = toy.trainer(tmp_path, max_epochs=2)
    trainer.fit(resumed, toy.loader(batches), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert resumed.ppo_step == whole.ppo_step == 4 and len(resumed.seen) == 2
    ours = dict(resumed.actor.named_parameters())
    assert all(torch.equal(ours[name], parameter) for name, parameter in whole.actor.named_parameters())


@pytest.mark.parametrize("lora", [False, True])
def test_a_saved_folder_loads_in_transformers(seq2seq_toy, tmp_path, lora):
    module = seq2seq_toy.ppo(lora=lora, learning_rate=1e-2)
    seq2seq_toy.fit(module, tmp_path)
    module.save_pretrained(tmp_path / "folder")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "folder").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert tokenizer("w3 w5").input_ids == [3, 5] and tokenizer.pad_token_id == seq2seq_toy.pad
    prompt, response = [3, 1, 4], [1, 5, 9, 2]
    with torch.no_grad():
        tokens = (torch.tensor([prompt]), torch.tensor([response]))
        masks = (torch.ones_like(each, dtype=torch.bool) for each in tokens)
        prompts, responses = zip(tokens, masks, strict=True)
        ours = module.actor.lm.response_logits(Prompts(*prompts), Responses(*responses))[0]
    torch.testing.assert_close(plain_logits(model, prompt, response), ours, atol=1e-4, rtol=1e-4)
    assert (plain_logits(seq2seq_toy.plain_model(), prompt, response) - ours).abs().max() > 1e-3
    head = load_file(tmp_path / "folder" / "value_head.safetensors")
    assert torch.equal(head["weight"], module.actor.value_head.weight)
    again = PPO(ModelSource(str(tmp_path / "folder")), seq2seq_toy.reward_class())
    assert again.shadowed_parameters().keys() == seq2seq_toy.ppo().shadowed_parameters().keys()


# Validation


def test_validation_against_brute_force(seq2seq_toy, tmp_path):
    module = seq2seq_toy.ppo(sampling={"temperature": 0.7}, execution=Execution(scoring_batch_size=3))
    seq2seq_toy.perturb(module, 0.05)
    batch, human = seq2seq_toy.prompts(rows=7), pairs(seq2seq_toy)
    rollout = module.sample(batch, -1)
    policy, initial = seq2seq_toy.plain_model(), seq2seq_toy.plain_model()
    policy.load_state_dict(module.actor.lm.model.state_dict())
    kl, fluency, rewards, forgetting = [], [], [], []
    for row in range(7):
        prompt = batch.tokens[row][batch.mask[row]].tolist()
        response = rollout.tokens[row][rollout.mask[row]].tolist()
        p, q = (torch.log_softmax(plain_logits(m, prompt, response) / 0.7, -1) for m in (policy, initial))
        kl.append((p.exp() * (p - q)).sum().item())
        plain = torch.log_softmax(plain_logits(initial, prompt, response), -1)
        fluency += [-plain[t, token].item() for t, token in enumerate(response)]
        words = [token for token in response if token < 27]
        rewards.append(words.count(3) / max(len(words), 1))
    for row in range(5):
        source = human.source.tokens[row][human.source.mask[row]].tolist()
        target = human.target.tokens[row][human.target.mask[row]].tolist()
        plain = torch.log_softmax(plain_logits(policy, source, target), -1)
        forgetting += [-plain[t, token].item() for t, token in enumerate(target)]
    trainer = seq2seq_toy.trainer(tmp_path)
    trainer.validate(module, seq2seq_toy.loader([batch, human]), verbose=False)
    values = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert values["val/kl"] == pytest.approx(sum(kl) / 7, rel=1e-4) and values["val/kl"] > 0.01
    assert values["val/sample_perplexity"] == pytest.approx(math.exp(sum(fluency) / len(fluency)), rel=1e-4)
    assert values["val/reward"] == pytest.approx(sum(rewards) / 7, abs=1e-6)
    assert values["val/perplexity"] == pytest.approx(math.exp(sum(forgetting) / len(forgetting)), rel=1e-4)
    trainer = seq2seq_toy.trainer(tmp_path)
    trainer.test(module, seq2seq_toy.loader([human]), verbose=False)
    assert trainer.callback_metrics["test/perplexity"].item() == pytest.approx(values["val/perplexity"])


def test_pairs_measure_a_causal_policy_too(toy, tmp_path):
    module, human, model, nll = toy.ppo(), pairs(toy), toy.plain_model(), []
    for row in range(5):
        source = human.source.tokens[row][human.source.mask[row]].tolist()
        target = human.target.tokens[row][human.target.mask[row]].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([source + target])).logits[0, len(source) - 1 : -1]
        nll += [-value.item() for value in torch.log_softmax(logits, -1)[range(len(target)), target]]
    trainer = toy.trainer(tmp_path)
    trainer.validate(module, toy.loader([human]), verbose=False)
    assert trainer.callback_metrics["val/perplexity"].item() == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)


def test_text_without_sources_is_refused(seq2seq_toy, tmp_path):
    with pytest.raises(UserError, match="validate on PairedTexts"):
        tokens = torch.randint(0, 27, (2, 6))
        seq2seq_toy.trainer(tmp_path).validate(seq2seq_toy.ppo(), seq2seq_toy.loader([tokens]), verbose=False)


def test_responses_are_texts_of_their_own(seq2seq_toy):
    prompts = seq2seq_toy.prompts(rows=2, ragged=False)
    responses = Responses(torch.tensor([[3, 4, seq2seq_toy.eos], [5, 6, 7]]), torch.ones(2, 3, dtype=torch.bool))
    texts, scores = seq2seq_toy.ppo().score(prompts, responses)
    assert texts.responses == ["w3 w4", "w5 w6 w7"] and texts.complete == [True, False]
    assert scores.total.tolist() == [0.5, 0.0]


# Learning


def test_ppo_learns(encoder_decoder_toys, tmp_path, read_events):
    toy, logger = encoder_decoder_toys["marian"], TensorBoardLogger(tmp_path, name="", version="run")
    module = toy.ppo(reward=toy.reward_class("w8"), head_noise=0.0, kl_penalty="none", learning_rate=5e-3)
    toy.fit(module, tmp_path, [toy.prompts(rows=16, seed=seed) for seed in range(10)], logger=logger)
    curves = read_events(logger.log_dir)
    rewards = [value for _, value in curves["train/reward"]]
    assert rewards[0] < 0.1 and sum(rewards[-3:]) / 3 > 0.6
    assert curves["train/kl"][-1][1] > 1
