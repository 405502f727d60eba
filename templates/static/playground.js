// The playground works without this script. It shows the answer as it arrives, and keeps the page.

const form = document.getElementById("playground"), conversation = document.getElementById("conversation");
const message = document.getElementById("f-message"), model = document.getElementById("f-model"), stop = document.getElementById("stop");
const answer = document.getElementById("answer"), progress = document.getElementById("progress");
const streamType = "application/x-ndjson";
message.placeholder = "Ctrl+Enter sends";
let running = null; // the AbortController of the call

// The server's pages are fetched and taken apart, so that each part is written in one place.
async function fetchPage(url, options) {
  const res = await fetch(url, options);
  return new DOMParser().parseFromString(await res.text(), "text/html");
}
function take(page, id) {
  const fresh = page.getElementById(id);
  if (fresh) document.getElementById(id).replaceWith(document.adoptNode(fresh));
  return fresh;
}
const formData = (what) => {
  const data = new URLSearchParams(new FormData(form));
  data.set("do", what);
  return data;
};

// A turn is a message with its text; sent also adds it to what the next call sends.
function addTurn(role, where, text, sent) {
  const turn = document.createElement("div"), who = document.createElement("p"), says = document.createElement("div");
  turn.className = `turn ${role}`;
  who.className = "who-says";
  who.textContent = role === "user" ? "You" : "Model";
  says.className = "says";
  says.textContent = text;
  turn.append(who, says);
  if (sent) {
    const input = document.createElement("input");
    input.type = "hidden";
    input.name = "turn";
    input.value = text;
    turn.append(input);
  }
  where.append(turn);
  return says;
}

function showProblem(text, call) {
  const p = document.createElement("p");
  p.className = "problem";
  p.setAttribute("role", "alert");
  p.textContent = `${text} `;
  if (call) {
    const link = document.createElement("a");
    link.href = `/admin/requests/${call}`;
    link.textContent = "See the call";
    p.append(link);
  }
  answer.append(p);
}

// The lines of a stream of JSON.
async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

// What the ledger has of the call. A call that was stopped takes a moment to be settled.
async function showResult(id, firstText) {
  for (let tries = 0; tries < 20; tries++) {
    const page = await fetchPage(`/admin/playground?${new URLSearchParams({ project_id: form.elements.project_id.value, call: id })}`);
    const found = page.querySelector("#result section");
    if (!found || found.dataset.outcome !== "open") {
      take(page, "result");
      break;
    }
    await new Promise((resolve) => setTimeout(resolve, 250));
  }
  const first = document.getElementById("first-text");
  if (first && firstText !== null) {
    first.querySelector("dd").textContent = `${Math.round(firstText)} ms`;
    first.hidden = false;
  }
  return document.querySelector("#result section") !== null;
}

async function send() {
  const text = message.value;
  running = new AbortController();
  const send = form.querySelector("button[value=send]");
  send.disabled = true;
  stop.hidden = false;
  document.querySelector("main > .problem")?.remove();
  document.getElementById("curl")?.remove();
  document.getElementById("result").replaceChildren();
  document.getElementById("headers").hidden = true;
  answer.replaceChildren();
  addTurn("user", answer, text, false);
  const says = addTurn("assistant", answer, "", false);
  progress.textContent = "Waiting for the answer.";
  const body = formData("send");
  body.delete("once");
  message.value = "";
  const start = performance.now();
  let id = "", firstText = null, problem = "The answer broke off.", stopped = false;
  try {
    const res = await fetch("/admin/playground", { method: "POST", body, headers: { Accept: streamType }, signal: running.signal });
    if (!res.headers.get("Content-Type")?.startsWith(streamType)) {
      const page = new DOMParser().parseFromString(await res.text(), "text/html");
      const found = page.querySelector("main .problem");
      if (!found || !page.getElementById("playground")) { // the session has ended: the page of the server keeps the input
        message.value = text;
        form.submit();
        return;
      }
      problem = found.textContent;
    } else {
      for await (const line of lines(res.body)) {
        if (line.id) id = line.id;
        if (line.headers) {
          document.querySelector("#headers pre").textContent = line.headers.map((h) => `${h.Label}: ${h.Value}`).join("\n");
          document.getElementById("headers").hidden = false;
        }
        if (line.text) {
          firstText ??= performance.now() - start;
          const atEnd = innerHeight + scrollY >= document.documentElement.scrollHeight - 40;
          says.textContent += line.text;
          if (atEnd) scrollTo(0, document.documentElement.scrollHeight);
        }
        if (line.done) problem = line.error ?? "";
      }
    }
  } catch {
    stopped = running.signal.aborted; // otherwise the connection broke
  }
  const recorded = id !== "" && await showResult(id, firstText).catch(() => false);
  if (says.textContent !== "" && (problem === "" || stopped)) {
    const shown = says.textContent;
    answer.replaceChildren();
    addTurn("user", conversation, text, true);
    addTurn("assistant", conversation, shown, true);
  } else {
    message.value ||= text;
    if (says.textContent === "") answer.replaceChildren();
  }
  if (problem !== "" && !stopped) showProblem(problem, recorded ? id : "");
  progress.textContent = stopped ? "Stopped." : problem || "The answer is complete.";
  running = null;
  send.disabled = false;
  stop.hidden = true;
  message.focus();
}

form.addEventListener("submit", (event) => {
  if (event.submitter && event.submitter.value !== "send") return;
  event.preventDefault();
  event.stopPropagation();
  if (running || message.value.trim() === "") {
    message.focus();
    return;
  }
  send();
});
stop.addEventListener("click", () => running?.abort());
message.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    form.requestSubmit(form.querySelector("button[value=send]"));
  }
});

// The models are asked for in place, and once for each project when the field gets the focus.
let asked = model.list.options.length > 0;
async function listModels() {
  asked = true;
  const page = await fetchPage("/admin/playground", { method: "POST", body: formData("models") }).catch(() => null);
  if (!page?.getElementById("models")) return;
  take(page, "models");
  const problem = page.querySelector("main > .problem");
  if (problem) document.getElementById("models-help").textContent = problem.textContent;
  else take(page, "models-help");
}
model.addEventListener("focus", () => { if (!asked) listModels(); });
form.querySelector("button[value=models]").addEventListener("click", (event) => {
  event.preventDefault();
  listModels();
});

// Another project has other models. A model that was typed meanwhile stays.
form.elements.project_id.addEventListener("change", async () => {
  const project = form.elements.project_id.value, before = model.value;
  const page = await fetchPage(`/admin/playground?${new URLSearchParams({ project_id: project })}`).catch(() => null);
  if (!page?.getElementById("models") || form.elements.project_id.value !== project) return;
  if (model.value === before) model.value = page.getElementById("f-model").value;
  document.getElementById("no-upstream")?.remove();
  const caution = page.getElementById("no-upstream");
  if (caution) form.before(document.adoptNode(caution));
  take(page, "models");
  take(page, "models-help");
  take(page, "new-conversation");
  asked = false;
});
