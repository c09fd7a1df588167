"""The same 200 questions in the two layouts that data sets have."""

RANKED = [
    {
        "question_id": number,
        "question": f"How do I sort list {number}?" + " Please!" * (number % 7),
        "answers": [f"Use sorted, for list {number}.", "I do not know.", f"Ask {number} others."][: 2 + number % 2],
    }
    for number in range(200)
]
PAIRED = [
    {"qid": row["question_id"], "question": row["question"], "response_j": row["answers"][0], "response_k": worse}
    for row in RANKED
    for worse in row["answers"][1:]
]
