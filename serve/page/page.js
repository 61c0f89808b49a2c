// One prompt, two columns: what each says, coloured by the risk that it is made up.

const SIDES = ["left", "right"];
const by = (id) => document.getElementById(id);
const side = (name, of) => document.querySelector(`[data-${name}="${of}"]`);
let running = null;
let tracking = null;
let takesFeedback = false;

async function start() {
  try {
    const about = await getJson("page.json");
    tracking = about.runs;
    takesFeedback = about.feedback;
    fill((await getJson("v1/models")).data);
    problem("");
  } catch (error) {
    problem(error.message);
  }
}

function fill(models) {
  const [base, ...prefixes] = models;
  by("base").textContent = `frozen ${base.id}, ${prefixes.length} prefix${prefixes.length === 1 ? "" : "es"}`;
  const names = [base.id, ...prefixes.flatMap((p) => [p.id, ...aliases(p)])];
  for (const of of SIDES) side("side", of).replaceChildren(...names.map((name) => new Option(name)));
  side("side", "right").selectedIndex = Math.min(1, names.length - 1);
  const detectors = listAliases(base.trimtab.detectors);
  by("detector").replaceChildren(new Option("the server's choice", ""), ...detectors.map((d) => new Option(d)), new Option("off"));
  const guards = listAliases(base.trimtab.prompt_detectors);
  const actions = guards.flatMap((guard) => ["annotate", "refuse"].map((action) => new Option(`${guard}: ${action}`)));
  by("guard").replaceChildren(new Option("the server's policies", ""), ...actions);
  by("guards").hidden = !guards.length;
}

const listAliases = (named) => Object.entries(named).flatMap(([name, held]) => Object.keys(held).map((a) => `${name}@${a}`));
const aliases = (prefix) => Object.keys(prefix.trimtab.aliases).filter((a) => a !== "champion").map((a) => `${prefix.id}@${a}`);

async function ask() {
  stop();
  problem("");
  running = new AbortController();
  busy(true);
  const { signal } = running;
  await Promise.all(SIDES.map((of) => answer(of, signal)));
  if (!signal.aborted) busy(false);
}

async function answer(of, signal) {
  const output = side("answer", of);
  const note = side("note", of);
  output.replaceChildren();
  output.className = "";
  note.replaceChildren();
  showThumbs(of, null);
  try {
    const body = request(side("side", of).value);
    const reply = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json", ...authorization() },
      body: JSON.stringify(body),
      signal,
    });
    if (!reply.ok) throw new Error(await reason(reply));
    if (body.stream) for await (const chunk of events(reply)) show(chunk, output, note);
    else show(await reply.json(), output, note);
    showThumbs(of, reply.headers.get("x-trimtab-request-id"));
  } catch (error) {
    if (error.name === "AbortError") return;
    output.className = "failed";
    output.textContent = error.message;
  }
}

function request(model) {
  const policy = by("policy").value;
  const options = { policy, running_risk: policy === "annotate" };
  if (by("detector").value) options.detector = by("detector").value;
  const [detector, action] = by("guard").value.split(": ");
  if (action) options.policies = [{ detector, action }];
  return {
    model,
    messages: [{ role: "user", content: by("prompt").value }],
    max_tokens: by("tokens").valueAsNumber,
    temperature: by("temperature").valueAsNumber,
    stream: policy === "annotate" || policy === "stop",
    trimtab: options,
  };
}

function show(chunk, output, note) {
  if (chunk.error) throw new Error(chunk.error.message);
  const choice = chunk.choices[0];
  const text = choice?.delta?.content ?? choice?.message?.content;
  if (text) {
    const token = document.createElement("span");
    token.textContent = text;
    const risk = choice.trimtab?.detectors?.[0]?.probability;
    if (risk !== undefined) {
      token.style.setProperty("--part", risk);
      token.title = `risk so far ${risk.toFixed(2)}`;
    }
    output.append(token);
  }
  if (chunk.trimtab) note.replaceChildren(...describe(chunk));
}

// A server that stores no signals takes no feedback.
function showThumbs(of, id) {
  const thumbs = side("thumbs", of);
  thumbs.hidden = !takesFeedback || !id;
  thumbs.dataset.id = id ?? "";
  for (const button of thumbs.querySelectorAll("button")) button.setAttribute("aria-pressed", false);
  thumbs.querySelector("[role=status]").textContent = "";
}

async function rate(thumbs, pressed) {
  const status = thumbs.querySelector("[role=status]");
  try {
    const reply = await fetch("v1/feedback", {
      method: "POST",
      headers: { "content-type": "application/json", ...authorization() },
      body: JSON.stringify({ id: thumbs.dataset.id, correct: pressed.dataset.correct === "true" }),
    });
    if (!reply.ok) throw new Error(await reason(reply));
    for (const button of thumbs.querySelectorAll("button")) button.setAttribute("aria-pressed", button === pressed);
    status.textContent = "stored";
  } catch (error) {
    status.textContent = error.message;
  }
}

function describe(chunk) {
  const { prefix, detectors, attempts } = chunk.trimtab;
  const [detector, ...policies] = detectors;
  const parts = [link(chunk.model, prefix?.run_id)];
  if (detector.status === "scored") {
    const risk = document.createElement("span");
    risk.className = detector.flagged ? "flagged" : "";
    risk.textContent = `risk ${detector.probability.toFixed(2)}${detector.flagged ? ", flagged" : ""}`;
    parts.push(risk, link(`${detector.name}@${detector.version}`, detector.run_id));
    if (attempts) parts.push(`least risky of ${attempts}`);
    if (detector.warning) parts.push(detector.warning);
  } else {
    parts.push(`not checked: ${detector.reason}`);
  }
  for (const policy of policies) parts.push(verdict(policy), link(`${policy.name}@${policy.version}`, policy.run_id));
  return parts.flatMap((part, index) => (index ? [" · ", part] : [part]));
}

function verdict(policy) {
  const subject = policy.label ? `${policy.subject}, ${policy.label}` : policy.subject;
  if (policy.status !== "scored") return `${subject} not checked: ${policy.reason}`;
  const shown = document.createElement("span");
  shown.className = policy.flagged ? "flagged" : "";
  const action = policy.action ? `, ${policy.action}` : "";
  shown.textContent = `${subject} ${policy.probability.toFixed(2)}${policy.flagged ? ", flagged" : ""}${action}`;
  return shown;
}

function link(text, run) {
  if (!tracking || !run) return document.createTextNode(text);
  const made = document.createElement("a");
  made.href = tracking + encodeURIComponent(run);
  made.target = "_blank";
  made.rel = "noreferrer";
  made.textContent = text;
  return made;
}

async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    waiting += value;
    const whole = waiting.split("\n\n");
    waiting = whole.pop();
    for (const event of whole) {
      if (event === "data: [DONE]") return;
      if (event.startsWith("data: ")) yield JSON.parse(event.slice(6));
    }
  }
}

async function reason(reply) {
  try {
    return (await reply.json()).error.message;
  } catch {
    return `the server answered ${reply.status}`;
  }
}

async function getJson(path) {
  const reply = await fetch(path, { headers: authorization() });
  if (reply.status === 401) by("asks-key").hidden = false;
  if (!reply.ok) throw new Error(await reason(reply));
  return reply.json();
}

// Kept in this tab only, and sent to this server only.
const authorization = () => (by("key").value ? { authorization: `Bearer ${by("key").value}` } : {});

function stop() {
  running?.abort();
  running = null;
  busy(false);
}

function busy(now) {
  by("stop").disabled = !now;
  document.body.dataset.busy = now;
}

function problem(text) {
  by("problem").hidden = !text;
  by("problem").textContent = text;
}

by("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
by("key").addEventListener("change", start);
by("stop").addEventListener("click", stop);
for (const button of document.querySelectorAll(".thumbs button")) {
  button.addEventListener("click", () => rate(button.parentElement, button));
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && by("ask").reportValidity()) ask();
  if (event.key === "Escape") stop();
});
start();
