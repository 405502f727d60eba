// SQL for limits: what calls have used before this process came to know of a
// limit. It is read from the sums, which always agree with the ledger.
package main

import (
	"context"
	"fmt"
)

// A pastUse is what settled calls of an endpoint and a model asked for have
// used since some time. asked is "" where names were not kept apart.
type pastUse struct {
	endpoint, asked         string
	calls, tokens, nanosUSD int64
}

// usedSince adds up what calls that began at from or later have used, of a
// token or, with token 0, of a whole project. from is the start of an hour (grain
// "hour") or of a day. Refused calls are not among them: they took nothing.
func (s *store) usedSince(ctx context.Context, grain string, project, token, from int64) ([]pastUse, error) {
	rows, err := s.read.QueryContext(ctx, `
		SELECT endpoint, asked, sum(calls), sum(input_tokens + output_tokens), sum(cost) FROM usage_sums
		WHERE grain = ? AND project = ? AND token = ? AND at >= ? AND outcome <> 'refused' GROUP BY endpoint, asked`,
		grain, project, token, from)
	if err != nil {
		return nil, fmt.Errorf("reading what a limit has used: %w", err)
	}
	defer rows.Close()
	var out []pastUse
	for rows.Next() {
		var u pastUse
		if err := rows.Scan(&u.endpoint, &u.asked, &u.calls, &u.tokens, &u.nanosUSD); err != nil {
			return nil, fmt.Errorf("reading what a limit has used: %w", err)
		}
		out = append(out, u)
	}
	return out, rows.Err()
}
