// What a text has that another does not, word by word (Japanese is cut by the browser's dictionary).

const LONGEST = 4000; // words; beyond them only the common beginning and end are found

export function words(text) {
  const cut = new Intl.Segmenter(undefined, { granularity: "word" });
  return Array.from(cut.segment(text), (one) => one.segment);
}

// {parts: [{text, same}], at: the first character that differs (null: none), share: 0 to 1}
export function difference(reference, text) {
  const [one, other] = [words(reference), words(text)];
  const kept = common(one, other);
  other.forEach((word, i) => {
    // a space between two words that differ is no agreement
    if (!word.trim() && i && !kept[i - 1] && kept[i + 1] === false) kept[i] = false;
  });
  const parts = [];
  let same = 0;
  other.forEach((word, i) => {
    const last = parts.at(-1);
    if (last?.same === kept[i]) last.text += word;
    else parts.push({ text: word, same: kept[i] });
    same += kept[i] ? word.length : 0;
  });
  let at = 0;
  while (at < text.length && text[at] === reference[at]) at += 1;
  const equal = at === text.length && at === reference.length;
  return { parts, at: equal ? null : at, share: same / Math.max(text.length, reference.length, 1) };
}

// For every word of `other` whether it is part of the longest common subsequence with `one`.
function common(one, other) {
  const kept = new Array(other.length).fill(false);
  let start = 0;
  while (start < Math.min(one.length, other.length) && one[start] === other[start]) start += 1;
  let [end, otherEnd] = [one.length, other.length];
  while (end > start && otherEnd > start && one[end - 1] === other[otherEnd - 1]) {
    end -= 1;
    otherEnd -= 1;
  }
  kept.fill(true, 0, start);
  kept.fill(true, otherEnd);
  const [rows, columns] = [end - start, otherEnd - start];
  if (rows * columns > LONGEST ** 2) return kept;
  // best[i][j]: the longest one of what follows word i of the one and word j of the other
  const best = Array.from({ length: rows + 1 }, () => new Uint16Array(columns + 1));
  for (let i = rows - 1; i >= 0; i -= 1) {
    for (let j = columns - 1; j >= 0; j -= 1) {
      const equal = one[start + i] === other[start + j];
      best[i][j] = equal ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
    }
  }
  for (let i = 0, j = 0; i < rows && j < columns; ) {
    if (one[start + i] === other[start + j]) {
      kept[start + j] = true;
      i += 1;
      j += 1;
    } else if (best[i + 1][j] >= best[i][j + 1]) i += 1;
    else j += 1;
  }
  return kept;
}
