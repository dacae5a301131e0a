// The interface in one language: elements say which text they show (data-t, data-t-label,
// data-t-placeholder), and code asks for others by key.

export const LANGUAGES = ["en", "ja"];
let labels = {};

export function t(key, names = {}) {
  return labels[key].replace(/\{(\w+)\}/g, (_, name) => names[name]);
}

export async function speak(lang) {
  const chosen = LANGUAGES.includes(lang) ? lang : "en";
  labels = await (await fetch(`/page/${chosen}.json`)).json();
  document.documentElement.lang = chosen;
  for (const one of document.querySelectorAll("[data-t]")) one.textContent = t(one.dataset.t);
  for (const one of document.querySelectorAll("[data-t-label]")) {
    one.setAttribute("aria-label", t(one.dataset.tLabel));
    if (one.matches("button")) one.title = t(one.dataset.tLabel);
  }
  for (const one of document.querySelectorAll("[data-t-placeholder]")) {
    one.placeholder = t(one.dataset.tPlaceholder);
  }
  return chosen;
}

export const language = () => document.documentElement.lang;

export function number(value, digits = 0) {
  return value.toLocaleString(language(), { maximumFractionDigits: digits });
}
