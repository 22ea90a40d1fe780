// What the browser loads: Vitessce as its package ships it, shown with the configuration that the test hands over.
import { Vitessce } from "@vitessce/dev";
import React from "react";
import { createRoot } from "react-dom/client";

window.show = (config) => {
  const root = createRoot(document.getElementById("root"));
  root.render(React.createElement(Vitessce, { config, height: 600, theme: "dark" }));
};
