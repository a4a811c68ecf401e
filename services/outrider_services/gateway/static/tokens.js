// The text of an answer, in which each token shows where it comes from.

const HALF = "\ufffd"; // shown for a part of a character

/** Cuts the text of an answer, which may come later than its tokens, into their pieces. */
export class Pieces {
  #queue = []; // tokens of which text is still to come

  /** Take in a chunk's text and tokens; the text in pieces `[text, kind]`, nothing left out. */
  take(text, tokens) {
    this.#queue.push(...tokens.filter((token) => token.text).map((token) => ({ ...token })));
    const pieces = [];
    let rest = text;
    while (rest && this.#queue.length) {
      const [piece, kind] = this.#next(rest);
      pieces.push([piece, kind]);
      rest = rest.slice(piece.length);
    }
    if (rest) pieces.push([rest, "plain"]);
    return pieces;
  }

  #next(rest) {
    const token = this.#queue[0];
    if (rest.startsWith(token.text)) {
      this.#queue.shift();
      return [token.text, token.kind];
    }
    if (token.text.startsWith(rest)) {
      token.text = token.text.slice(rest.length); // it may begin a stop string
      return [rest, token.kind];
    }
    return this.#split(rest);
  }

  /** Characters whose bytes several tokens share: one piece, of the token that ends them. */
  #split(rest) {
    let kind = this.#queue[0].kind;
    do kind = this.#queue.shift().kind;
    while (this.#queue.length && this.#queue[0].text.startsWith(HALF));
    const next = this.#queue[0]?.text.split(HALF)[0];
    const end = next ? rest.indexOf(next, 1) : -1;
    return [end < 0 ? rest : rest.slice(0, end), kind];
  }
}

/** Put the pieces behind what `element` shows, each as text. */
export function show(element, pieces) {
  for (const [text, kind] of pieces) {
    const span = document.createElement("span");
    span.className = kind;
    span.textContent = text;
    element.append(span);
  }
}
