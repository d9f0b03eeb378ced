"use strict";

// Everything that others wrote (names, answers, passages) becomes text nodes, never markup.

const byId = (id) => document.getElementById(id);
const count = (number) => Number(number).toLocaleString("en");

let memories = [];
let messages = [];       // of the conversation
let reader = null;       // stops the answer or the upload that is on its way
let key = sessionStorage.getItem("fot-key") || "";

function element(name, options, ...children) {
  const made = document.createElement(name);
  Object.assign(made, options || {});
  made.append(...children.filter((child) => child !== null));
  return made;
}

// ---- the server ----------------------------------------------------------------------------------------------------

/** An answer of the server; asks for the key once, if one is needed. Errors say what the server says. */
async function ask(path, options = {}) {
  for (;;) {
    const headers = { ...(options.headers || {}), ...(key ? { Authorization: "Bearer " + key } : {}) };
    const answer = await fetch(path, { ...options, headers });
    if (answer.ok) return answer;
    if (answer.status === 401) {
      const given = prompt("This server needs a key.");
      if (given) {
        key = given;
        sessionStorage.setItem("fot-key", key);
        continue;
      }
    }
    const told = await answer.json().catch(() => null);
    throw new Error(told && told.error ? told.error.message : "The server answers " + answer.status + ".");
  }
}

/** The events of an answer, as objects. */
async function* events(answer) {
  const stream = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await stream.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (!data || data === "[DONE]") continue;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// ---- memories ------------------------------------------------------------------------------------------------------

async function listMemories(chosen) {
  const found = await (await ask("api/memories")).json();
  memories = found.memories;
  const select = byId("memory");
  select.replaceChildren(...memories.map((one) => new Option(one.has_memory ? one.id : one.id + " (no memory)", one.id)));
  if (chosen) select.value = chosen;
  byId("show-upload").hidden = !found.can_make;
  describe();
}

function describe() {
  const one = memories.find((memory) => memory.id === byId("memory").value);
  if (!one) return;
  const names = Object.keys(one.titles);
  const shown = names.slice(0, 6).join(", ") + (names.length > 6 ? " and " + count(names.length - 6) + " more" : "");
  byId("facts").textContent = one.has_memory
    ? count(one.tokens) + " tokens in " + count(names.length) + (names.length === 1 ? " document" : " documents") + (shown ? ": " + shown : "")
    : "The model alone, without a memory.";
}

// ---- conversation --------------------------------------------------------------------------------------------------

function begin() {
  messages = [];
  byId("turns").replaceChildren();
  showPassages([], "What an answer was read from is shown here.");
  byId("question").focus();
}

function addTurn(role, text) {
  const body = element("span", { textContent: text });
  const turn = element("li", { className: role }, body);
  turn.body = body;
  byId("turns").append(turn);
  turn.scrollIntoView({ block: "nearest" });
  return turn;
}

async function say(question) {
  const model = byId("memory").value;
  addTurn("user", question);
  const turn = addTurn("assistant", "…");
  busy(true);
  let text = "", cited = [], finish = null;
  try {
    const answer = await ask("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ model, messages: [...messages, { role: "user", content: question }], stream: true }),
      signal: reader.signal,
    });
    for await (const event of events(answer)) {
      for (const choice of event.choices) {
        text += choice.delta.content || "";
        cited = choice.delta.annotations || cited;
        finish = choice.finish_reason || finish;
      }
      turn.body.textContent = text || "…";
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      turn.classList.add("wrong");
      turn.body.textContent = error.message;
      return;
    }
  } finally {
    busy(false);
  }
  turn.body.textContent = text || "(no answer)";
  if (finish) messages.push({ role: "user", content: question }, { role: "assistant", content: text });
  finishTurn(turn, model, question, cited.map((one) => one.passage).filter(Boolean), finish);
}

function finishTurn(turn, model, question, passages, finish) {
  const show = () => {
    document.querySelectorAll("#turns [aria-current]").forEach((other) => other.removeAttribute("aria-current"));
    turn.setAttribute("aria-current", "true");
    showPassages(passages, passages.length ? "What this answer was read from, best first." : "No passages.");
  };
  const look = element("button", { type: "button", className: "link", textContent: "Passages" });
  const tokens = element("button", { type: "button", className: "link", textContent: "Inspect tokens" });
  const cut = finish === "length" ? element("span", { textContent: "cut off" }) : finish ? null : element("span", { textContent: "stopped" });
  look.addEventListener("click", show);
  turn.addEventListener("click", show);
  tokens.addEventListener("click", (event) => { event.stopPropagation(); inspect(tokens, model, question); });
  turn.append(element("div", { className: "more" }, look, tokens, cut));
  show();
}

function showPassages(passages, facts) {
  byId("sources-facts").textContent = facts;
  byId("passages").replaceChildren(...passages.map((passage) => {
    const [first, last] = passage.marked, marked = passage.text.slice(first, last);
    const excerpt = element("p", { className: "excerpt" }, passage.text.slice(0, first),
      marked === passage.text ? marked : element("mark", { textContent: marked }), passage.text.slice(last));
    const place = passage.span ? "characters " + count(passage.span[0]) + "–" + count(passage.span[1]) : "";
    const source = element("div", { className: "source" }, element("b", { textContent: passage.document }),
      element("span", { textContent: place + (passage.share ? " · " + (100 * passage.share).toFixed(1) + " %" : "") }));
    return element("li", {}, source, excerpt);
  }));
}

/** The page of what each token of an answer attended to, in another tab: open before waiting, or it is blocked. */
async function inspect(button, model, question) {
  const tab = window.open("", "_blank");
  button.disabled = true;
  try {
    const made = await (await ask("api/inspections", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ model, question }),
    })).json();
    if (tab) tab.location = made.page; else location.assign(made.page);
  } catch (error) {
    if (tab) tab.close();
    showPassages([], error.message);
  } finally {
    button.disabled = false;
  }
}

function busy(is) {
  reader = is ? new AbortController() : null;
  byId("send").hidden = is;
  byId("stop").hidden = !is;
  byId("memory").disabled = is;
  byId("new-chat").disabled = is;
}

// ---- new memory ----------------------------------------------------------------------------------------------------

function time(seconds) {
  return seconds < 90 ? Math.ceil(seconds) + " s" : Math.ceil(seconds / 60) + " min";
}

async function upload(name, files) {
  const bar = byId("upload-bar"), state = byId("upload-state"), form = new FormData();
  for (const file of files) form.append("files", file);
  reader = new AbortController();
  const buttons = [byId("upload").querySelector("[type=submit]"), byId("send")];
  buttons.forEach((button) => { button.disabled = true; });
  state.classList.remove("wrong");
  byId("upload-stop").hidden = bar.hidden = false;
  bar.removeAttribute("value");
  state.textContent = "Sending the files …";
  try {
    const answer = await ask("api/memories/" + encodeURIComponent(name), { method: "POST", body: form, signal: reader.signal });
    for await (const event of events(answer)) {
      if (event.done) {
        const wrong = event.left_out.length ? " Left out: " + event.left_out.join("; ") : "";
        state.textContent = count(event.done.tokens) + " tokens in " + count(event.done.documents) + " documents are read." + wrong;
        await listMemories(name);
        begin();
      } else {
        bar.value = event.tokens / Math.max(1, event.total);
        state.textContent = event.file + ": " + count(event.tokens) + " of about " + count(event.total) + " tokens, " +
          count(Math.round(event.tokens_per_second)) + " a second, " + time(event.seconds_left) + " left";
      }
    }
  } catch (error) {
    state.classList.add("wrong");
    state.textContent = error.name === "AbortError" ? "Stopped; nothing was kept." : error.message;
  } finally {
    buttons.forEach((button) => { button.disabled = false; });
    byId("upload-stop").hidden = bar.hidden = true;
    reader = null;
  }
}

// ---- start ---------------------------------------------------------------------------------------------------------

function start() {
  const question = byId("question");
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = question.value.trim();
    if (!text || reader) return;
    question.value = "";
    say(text).then(() => question.focus());
  });
  question.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      byId("ask").requestSubmit();
    }
  });
  addEventListener("keydown", (event) => { if (event.key === "Escape" && reader) reader.abort(); });
  for (const id of ["stop", "upload-stop"]) byId(id).addEventListener("click", () => { if (reader) reader.abort(); });
  byId("new-chat").addEventListener("click", begin);
  byId("memory").addEventListener("change", () => { describe(); begin(); });
  byId("show-upload").addEventListener("click", () => {
    const form = byId("upload");
    form.hidden = !form.hidden;
    byId("show-upload").setAttribute("aria-expanded", String(!form.hidden));
    if (!form.hidden) byId("upload-name").focus();
  });
  byId("upload").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!reader) upload(byId("upload-name").value, byId("upload-files").files);
  });
  listMemories().then(begin).catch((error) => {
    byId("facts").classList.add("wrong");
    byId("facts").textContent = error.message;
  });
}

start();
