package main

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"
)

type epochsCommand struct{}

// Run prints how the epochs of the site stand.
func (epochsCommand) Run(ctx context.Context, s *session) error {
	p, client, err := s.operator()
	if err != nil {
		return err
	}
	e, err := client.Epochs(ctx)
	if err != nil {
		return p.explain(err, p.unlisted())
	}
	if s.JSON {
		return s.printJSON(e)
	}
	var b bytes.Buffer
	w := tabwriter.NewWriter(&b, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "EPOCH\tFROM\tSTATE\tSTORED\tWAITING\tKEK\tSEALED\tCOPIES AT")
	for _, epoch := range e.Epochs {
		fmt.Fprintf(w, "%d\t%s\t%s\t%d\t%d", epoch.Epoch, clock(epoch.Starts), epoch.State, epoch.Stored, epoch.Waiting)
		for i, k := range epoch.KEKs {
			if i > 0 {
				fmt.Fprint(w, "\n\t\t\t\t")
			}
			fmt.Fprintf(w, "\t%d %s\t%d\t%s", k.ID, k.State, k.Wraps, printable(strings.Join(k.Copies, " ")))
		}
		fmt.Fprintln(w)
	}
	_ = w.Flush() // a buffer takes all
	fmt.Fprintf(&b, "What is stored of a key cannot be opened by anybody %v after it was handed out at the latest,\nas long as the HSM, the database and a node are well. An epoch lasts %v.\n",
		seconds(e.WorstCase).Round(time.Second), seconds(e.Length))
	_, err = s.stdout.Write(b.Bytes())
	return err
}
