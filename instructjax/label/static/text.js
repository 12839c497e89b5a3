// Texts of models and of data as text: never as markup.

// Characters that change the direction of the text around them. They are shown by name, and do nothing.
const CONTROLS = /([\u202a-\u202e\u2066-\u2069])/;

export function fill(element, text) {
  element.replaceChildren(...text.split(CONTROLS).filter(part => part).map(part => {
    if (!CONTROLS.test(part)) return part;
    const mark = document.createElement("span");
    mark.className = "control";
    mark.textContent = `U+${part.codePointAt(0).toString(16).toUpperCase()}`;
    return mark;
  }));
}

export function excerpt(text) { return text.slice(0, 200).split(CONTROLS).filter(part => !CONTROLS.test(part)).join("").slice(0, 80); }
