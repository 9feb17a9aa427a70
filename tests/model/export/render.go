// Renders a template as Ollama does, with Go's text/template: {"template": .., "conversations": {name: [message, ..]}}
// on standard input gives {name: text}.
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"text/template"
)

type message struct{ Role, Content string }

func main() {
	var asked struct {
		Template      string
		Conversations map[string][]message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(asked.Template))
	rendered := map[string]string{}
	for name, messages := range asked.Conversations {
		var text bytes.Buffer
		if err := parsed.Execute(&text, map[string]any{"Messages": messages, "Response": ""}); err != nil {
			panic(err)
		}
		rendered[name] = text.String()
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(rendered); err != nil {
		panic(err)
	}
}
