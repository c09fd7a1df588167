"""A reward of one's own: any function of prompts and responses.

python docs/examples/length_reward.py
"""

from elastic_lightning import FunctionReward
from elastic_lightning.rewards import score


def close_to_ten_words(prompts: list[str], responses: list[str]) -> list[float]:
    """1 for a response of ten words, less for shorter and longer ones."""
    return [1 / (1 + abs(len(response.split()) - 10)) for response in responses]


if __name__ == "__main__":
    # In a configuration: {class_path: FunctionReward, init_args: {function: length_reward.close_to_ten_words}}
    reward = FunctionReward(close_to_ten_words)
    print(score(reward, ["Say it:", "Say it:"], [" one two", " 1 2 3 4 5 6 7 8 9 10"]).total.tolist())
