// What is where on the page, and who is told of what.

import { models as askModels } from "./api.js";
import { trouble, untroubled } from "./answer.js";
import { Chat } from "./chat.js";
import { Compare } from "./compare.js";
import { element, find } from "./dom.js";
import * as settings from "./settings.js";
import { store } from "./store.js";
import { LANGUAGES, language, number, speak, t } from "./words.js";

let models = [];
let running = null; // the AbortController of what is being answered
const chosen = () => models.find((model) => model.id === find("model").value) ?? models[0];
const chat = new Chat(chosen);
const compare = new Compare();
const comparing = () => !find("compare").hidden;

// models and their figures

async function refresh() {
  try {
    models = await askModels();
  } catch (error) {
    trouble(error);
    return;
  }
  const before = find("model").value || store.settings.model;
  find("model").replaceChildren(...models.map(({ id }) => element("option", { value: id }, id)));
  if (models.some((model) => model.id === before)) find("model").value = before;
  remember();
}

function remember() {
  const model = chosen();
  if (!model) return;
  const size = `${number(model.quantkit.memory_bytes / 1e9, 2)} GB`;
  find("memory").textContent = t("memory", { size });
  find("memory").title = `${model.quantkit.engine}, ${model.quantkit.format}, ${number(model.max_model_len)}`;
  find("input").placeholder = t(model.quantkit.chat_template ? "write" : "write_text");
}

async function measure() {
  try {
    models = await askModels();
    remember();
  } catch {
    // the answer itself told what is wrong
  }
}

// asking

async function submit(text) {
  if (running) return;
  untroubled();
  running = new AbortController();
  busy(true);
  try {
    await (comparing() ? compare : chat).ask(text, running.signal);
    if (!running.signal.aborted) find("live").textContent = t("answered");
  } finally {
    running = null;
    busy(false);
    measure();
  }
}

function busy(so) {
  find("send").hidden = so;
  find("stop").hidden = !so;
  find("live").textContent = "";
}

function stop() {
  running?.abort();
}

function sendWritten() {
  const text = find("input").value;
  if (!text.trim() || running || !models.length) return;
  find("input").value = "";
  grow();
  submit(text);
}

function grow() {
  const input = find("input");
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight + 2, innerHeight * 0.4)}px`;
}

// conversations

function listChats() {
  const entries = store.chats.map((one) => {
    const title = one.title || t("untitled");
    const open = element("button", { className: "entry", onclick: () => openChat(one) }, title);
    if (one.id === chat.now.id) open.setAttribute("aria-current", "true");
    const remove = element("button", { className: "icon", onclick: () => dropChat(one, title) }, "×");
    remove.setAttribute("aria-label", `${t("delete")}: ${title}`);
    return element("li", {}, open, remove);
  });
  find("list").replaceChildren(...entries);
}

function openChat(one) {
  stop();
  chat.open(one);
  listChats();
  show("chat");
  unfold(false);
  find("input").focus();
}

function dropChat(one, title) {
  if (!confirm(t("delete_sure", { title }))) return;
  store.remove(one.id);
  if (one.id === chat.now.id) openChat(null);
  listChats();
}

// looks

function show(which) {
  for (const name of ["chat", "compare"]) {
    find(name).hidden = name !== which;
    find(`tab-${name}`).setAttribute("aria-selected", name === which);
    find(`tab-${name}`).tabIndex = name === which ? 0 : -1;
  }
  find("pick").hidden = which !== "chat";
  store.set("shown", which);
}

function unfold(so) {
  document.body.classList.toggle("unfolded", so);
  find("menu").setAttribute("aria-expanded", so);
}

function paint() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  document.documentElement.dataset.theme = store.settings.theme ?? dark;
}

async function translate(lang) {
  store.set("lang", await speak(lang));
  const other = LANGUAGES.find((one) => one !== language());
  find("lang").textContent = other === "ja" ? "日本語" : "EN";
  find("lang").lang = other;
  chat.draw();
  compare.draw();
  listChats();
  remember();
}

function keys(event) {
  if (event.key === "Escape" && running) stop();
  const typing = event.target.closest("input, textarea, select, dialog");
  if (event.key === "/" && !typing) {
    event.preventDefault();
    find("input").focus();
  }
}

function typed(event) {
  // Enter that ends the conversion of Japanese input is not for us (229: Safari's way to say so)
  if (event.isComposing || event.keyCode === 229) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    sendWritten();
  }
}

function wire() {
  find("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    sendWritten();
  });
  find("input").addEventListener("keydown", typed);
  find("input").addEventListener("input", grow);
  find("stop").addEventListener("click", stop);
  find("new").addEventListener("click", () => openChat(null));
  find("menu").addEventListener("click", () => unfold(!document.body.classList.contains("unfolded")));
  find("shade").addEventListener("click", () => unfold(false));
  document.addEventListener("keydown", keys);
  for (const name of ["chat", "compare"]) {
    find(`tab-${name}`).addEventListener("click", () => show(name));
    find(`tab-${name}`).addEventListener("keydown", (event) => {
      if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
      const other = name === "chat" ? "compare" : "chat";
      show(other);
      find(`tab-${other}`).focus();
    });
  }
  find("model").addEventListener("change", () => {
    store.set("model", find("model").value);
    remember();
    if (!chat.now.messages.length) chat.draw();
  });
  find("settings-open").addEventListener("click", () => {
    settings.show(chosen());
    find("settings").showModal();
  });
  find("lang").addEventListener("click", () => translate(find("lang").lang));
  find("theme").addEventListener("click", () => {
    store.set("theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    paint();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  settings.install(start);
  chat.changed = listChats;
  chat.submit = () => submit("");
  store.dropped = () => trouble(new Error(t("full")));
}

async function start() {
  untroubled();
  await refresh();
  compare.offer(models);
  chat.draw();
}

paint();
wire();
await translate(store.settings.lang ?? navigator.language.slice(0, 2));
show(store.settings.shown === "compare" ? "compare" : "chat");
await start();
find("input").focus();
