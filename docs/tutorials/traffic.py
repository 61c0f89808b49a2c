"""Traffic of the tutorial feedback.md: country questions to a server, and labels for the answers.

python traffic.py URL KIND COUNT [KEY]

KIND is capitals, currencies or continents. An answer is labeled as right if it contains a reference answer.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import httpx

from trimtab.data.question_sets import read_question_set

url, kind, count, *key = sys.argv[1:]
headers = {"authorization": f"Bearer {key[0]}"} if key else {}
rows = [row for row in read_question_set("countries") if row["source"] == kind]
with httpx.Client(base_url=url, headers=headers, timeout=300) as client, ThreadPoolExecutor(4) as pool:
    model = client.get("/v1/models").json()["data"][0]["id"]

    def send_and_label(row):
        messages = [{"role": "user", "content": row["question"]}]
        body = {"model": model, "messages": messages, "max_tokens": 24, "temperature": 0}
        response = client.post("/v1/chat/completions", json=body).raise_for_status()
        answer = response.json()["choices"][0]["message"]["content"].lower()
        correct = any(reference.lower() in answer for reference in row["answers"])
        label = {"id": response.headers["x-trimtab-request-id"], "correct": correct}
        client.post("/v1/feedback", json=label).raise_for_status()
        return correct

    labels = list(pool.map(send_and_label, rows[: int(count)]))
print(f"{len(labels)} answers about {kind} labeled, {sum(labels)} of them right")
