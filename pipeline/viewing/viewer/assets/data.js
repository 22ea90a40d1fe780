// Addresses of the data of the result that this page shows.

// They contain the version of the result: after a restart, wsi-view may show another result at the address of this page.
const version = document.querySelector("meta[name=version]").content;

// Returns the address of a file of the result, relative to the page.
export const dataUrl = (path) => `${version}/${path}`;
