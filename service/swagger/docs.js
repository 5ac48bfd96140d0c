// Start Swagger UI, and show each row of a matrix on one line.

const NUMBER_LIST = /\[\s+(-?[\d.eE+-]+(?:,\s+-?[\d.eE+-]+)*)\s+\]/g

function joinRows(text) {
  if (typeof text !== "string") return text
  return text.replace(NUMBER_LIST, (_, numbers) => `[${numbers.replace(/\s+/g, " ")}]`)
}

// Text that Swagger UI has generated, not text that is being typed.
function isGenerated(text) {
  try {
    return text === JSON.stringify(JSON.parse(text), null, 2)
  } catch {
    return false
  }
}

function CompactMatrices({ React }) {
  return {
    wrapComponents: {
      HighlightCode: (Original) => (props) =>
        React.createElement(Original, { ...props, children: joinRows(props.children) }),
      RequestBodyEditor: (Original) => (props) =>
        React.createElement(Original, { ...props, value: isGenerated(props.value) ? joinRows(props.value) : props.value }),
    },
  }
}

window.ui = SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  defaultModelsExpandDepth: 0,
  tryItOutEnabled: true,
  plugins: [CompactMatrices],
})
