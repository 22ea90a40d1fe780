// What both views need: requests to the server, the pictures of the next patches, and buttons that save.

// An error that is `passing` may be gone when the request is sent again: the server does not answer, or is not ready.
export class ServerError extends Error {
  constructor(message, passing) {
    super(message);
    this.passing = passing;
  }
}

async function answered(request) {
  let response;
  try {
    response = await request;
  } catch {
    throw new ServerError(`wsi-label does not answer. If it has ended, start it again with the same slides, folder and --port ${location.port}.`, true);
  }
  if (!response.ok) throw new ServerError(await response.text(), response.status === 503);
  return response.json();
}

export const state = () => answered(fetch("/state.json"));

export const post = (path, body) =>
  answered(fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) }));

// Returns the answers for the classes that the page showed with a patch. The server counts a merged class as the one
// that contains it.
export const answersFor = (classes, present) =>
  Object.fromEntries(classes.map(({ id }) => [id, present.has(id) ? "present" : "absent"]));

// The second click of a double click would save patches that nobody has looked at.
export const onFirstClick = (button, act) =>
  button.addEventListener("click", ({ detail }) => detail > 1 || act());

// The pictures of a patch are elements that stay alive, because the browser may not keep them in its cache.
export class Pictures {
  constructor() {
    this.kept = new Map();
  }

  // A picture that could not be loaded is requested again.
  of(patch) {
    const kept = this.kept.get(patch.id);
    if (!kept || (kept.patch.complete && !isLoaded(kept.patch))) {
      this.kept.set(patch.id, { around: picture(patch, "context"), patch: picture(patch, "patch") });
    }
    return this.kept.get(patch.id);
  }

  keep(patches) {
    for (const patch of patches) this.of(patch);
    const wanted = new Set(patches.map((patch) => patch.id));
    for (const id of this.kept.keys()) if (!wanted.has(id)) this.kept.delete(id);
  }
}

// An image that failed is complete, too, but has no size.
export const isLoaded = (image) => Boolean(image?.complete && image.naturalWidth);

export function picture(patch, kind) {
  const image = new Image();
  image.src = `/patches/${patch.id}/${kind}.jpg`;
  image.alt = kind === "patch" ? `Patch of ${patch.slide}` : "";
  image.className = kind === "patch" ? "patch" : "around";
  return image;
}
